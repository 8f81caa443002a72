// The C border that lowbit.ops.cpu.helper loads through ctypes. It knows nothing of torch: pointers and sizes come in, so one
// build serves every version of torch.
//
// Every function that computes returns a Status; no exception crosses the border. kAbi changes with any signature, type code or
// layout of this file, and helper.ABI with it: Python refuses a library that was built from another version.

#include <mutex>
#include <shared_mutex>

#include "kernel_set.h"
#include "runtime.h"

#ifdef LOWBIT_HAVE_BF16
#include <cpuid.h>
#endif
#ifdef LOWBIT_HAVE_AMX
#include <sys/syscall.h>
#include <unistd.h>
#endif

#if defined(__GNUC__) || defined(__clang__)
#define LOWBIT_EXPORT extern "C" __attribute__((visibility("default")))
#else
#define LOWBIT_EXPORT extern "C" __declspec(dllexport)
#endif

namespace lowbit {
namespace {

constexpr int kAbi = 1;

enum Status : int { kOk = 0, kUnsupported = 1, kOutOfMemory = 2, kFailed = 3 };

thread_local int64_t failed_bytes = 0;  // that the last call that ran out of memory asked for

// Runs what an entry does, with the scratch memory in use.
template <typename Body>
int guarded(Body body) noexcept {
    try {
        const std::shared_lock<std::shared_mutex> lock(running_calls());
        return body();
    } catch (const OutOfScratch& error) {
        failed_bytes = error.bytes;
        return kOutOfMemory;
    } catch (const std::bad_alloc&) {
        failed_bytes = 0;
        return kOutOfMemory;
    } catch (...) {
        return kFailed;
    }
}

#ifdef LOWBIT_EMULATE
int best_isa() { return kAmx; }
bool has_vnni() { return true; }
#else

#ifdef LOWBIT_HAVE_BF16
// Whether the CPU has all that the unit avx512_bf16 is compiled for, beyond AVX-512.
bool has_bf16() {
    unsigned a, b, c, d;
    constexpr unsigned kBFloat16Bit = 1u << 5;
    if (!__builtin_cpu_supports("avx512vnni") || !__builtin_cpu_supports("avx512vbmi")) return false;
    return bf16_kernels() && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & kBFloat16Bit);
}
#else
bool has_bf16() { return false; }
#endif

#ifdef LOWBIT_HAVE_AMX
// Whether the CPU has AMX for both types, and what goes with it, and the system lets this process use it.
bool has_amx() {
    unsigned a, b, c, d;
    constexpr unsigned kBFloat16Bit = 1u << 22, kTileBit = 1u << 24, kInt8Bit = 1u << 25,
                       kAll = kBFloat16Bit | kTileBit | kInt8Bit;
    if (!has_bf16() || !amx_kernels() || !__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & kAll) != kAll) return false;
    constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
#else
bool has_amx() { return false; }
#endif

int best_isa() {
#ifdef LOWBIT_HAVE_X86
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq"))
        return has_amx() ? kAmx : has_bf16() ? kAvx512BFloat16 : kAvx512;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return kAvx2;  // and F16C, older than both
#endif
    return kGeneric;
}

bool has_vnni() {
#ifdef LOWBIT_HAVE_X86
    return best_isa() >= kAvx512 && __builtin_cpu_supports("avx512vnni");
#else
    return false;
#endif
}
#endif

KernelSet kernel_set(int isa) {
    KernelSet set{};
    set.isa = isa;
    set.base = isa >= kAvx512 ? avx512_kernels() : isa == kAvx2 ? avx2_kernels() : generic_kernels();
    if (isa >= kAvx512 && has_vnni()) set.vnni = vnni_kernels();
    if (isa >= kAvx512BFloat16) set.bf16 = isa == kAmx ? amx_bf16_kernels() : bf16_kernels();
    if (isa == kAmx) set.amx = amx_kernels();
    return set;
}

KernelSet& selected() {
    static KernelSet set = kernel_set(best_isa());
    return set;
}

const GgufKernels* gguf_kernels_of(int number) {
    const BaseKernels& base = *selected().base;
    for (int i = 0; i < base.gguf_types; ++i)
        if (base.gguf[i].number == number) return base.gguf + i;
    return nullptr;
}

bool is_row(const GgufKernels& kernels, int64_t columns, int64_t row_bytes) {
    return columns % kernels.elements == 0 && columns / kernels.elements * kernels.bytes == row_bytes;
}

enum Arrangement : int { kSplitFloat32 = 0, kPlainFloat32 = 1, kPlainBFloat16 = 2 };  // of UnitRowsKernels::arrange

// GEMV by a weight, or false where there are no kernels for it or the rows, or results are not of 16 bits.
bool run_units(const UnitRowsKernels* kernels, UnitRowsJob job, Arrangement arrangement, int64_t max_rows, int threads) {
    if (!kernels || job.rows <= 0 || job.rows > max_rows || job.columns <= 0 || job.element_type == kFloat32) return false;
    const int64_t units = job.rows * job.depth / kKTile;
    job.units = scratch<char>(Slot::kTiles, units * kernels->unit_bytes);
    job.unit_floats = scratch<float>(Slot::kUnitFloats, units * kernels->unit_floats);
    run(kernels->arrange[arrangement], job, units, job.rows * job.depth, threads);
    run(kernels->multiply[job.rows - 1], job, blocks(job.columns, kUnitChannels), job.columns * job.depth / 4, threads);
    return true;
}

// Rows of bfloat16 times a weight that is decoded to it; args.low_rank only of few rows.
void run_bfloat16(const BFloat16Kernels& kernels, const GemmArgs& args, const BFloat16Decoder& decoder, int threads) {
    constexpr int64_t kRowsAtOnce = 4096;  // that are held as they are multiplied; each piece reads the whole weight
    for (int64_t first = 0; first < args.rows && args.columns > 0; first += kRowsAtOnce) {
        GemmArgs part = args;
        part.input = static_cast<const BFloat16*>(args.input) + first * args.stride;
        part.output = static_cast<BFloat16*>(args.output) + first * args.columns;
        part.rows = smaller(kRowsAtOnce, args.rows - first), part.depth = 2 * args.depth, part.stride = 2 * args.stride;
        part.weight.column_scale = decoder.channel_scale, part.decoder = &decoder;
        if (part.rows <= kMaxFewRows) kernels.multiply_few(part, threads);
        else kernels.multiply_many(part, threads);
    }
}

void int8_gemm(const Int8Gemm& gemm, int threads) {
    if (gemm.rows <= 0 || gemm.columns <= 0) return;
    const AmxKernels* const amx = selected().amx;
    if (amx) amx->int8_gemm(gemm, threads);
    else vnni_kernels()->int8_gemm(gemm, threads);
}

void int8_linears(const Int8Linears& linears, int threads) {
    constexpr int64_t kRowsAtOnce = 1152;  // whose codes are held; each piece reads the whole weights
    const int64_t element_bytes = linears.element_type == kFloat32 ? 4 : 2;
    for (int64_t first = 0; first < linears.rows; first += kRowsAtOnce) {
        const int64_t rows = smaller(kRowsAtOnce, linears.rows - first);
        QuantizeJob job{};
        job.input = static_cast<const char*>(linears.x) + first * linears.stride * element_bytes;
        job.rows = rows, job.stride = linears.stride, job.block_rows = 1;
        job.columns = job.block_columns = linears.depth;
        auto* const codes = scratch<uint8_t>(Slot::kCodes, rows * linears.depth);
        job.output = codes, job.scale = scratch<float>(Slot::kScales, rows);
        run(selected().base->quantize[linears.element_type][kCodeUint8], job, rows, rows * linears.depth, threads);
        for (int64_t i = 0; i < linears.count; ++i) {
            Int8Gemm gemm{};
            gemm.x = codes, gemm.x_scale = job.scale, gemm.rows = rows, gemm.depth = linears.depth;
            gemm.weight = linears.weights[i], gemm.weight_scale = linears.weight_scales[i], gemm.bias = linears.biases[i];
            gemm.columns = linears.columns[i], gemm.element_type = linears.element_type;
            gemm.output = static_cast<char*>(linears.outputs[i]) + first * gemm.columns * element_bytes;
            int8_gemm(gemm, threads);
        }
    }
}

void attention(AttentionJob job, const AttentionKernels& kernels, int element_type, int threads) {
    job.head_bytes = kernels.head_bytes(job);
    // Several heads at a time, so that threads seldom wait for each other; few enough that what is prepared of their keys
    // and values is found in the cache.
    constexpr int64_t kBytesAtOnce = int64_t{16} << 20;
    const int64_t units = job.batch * job.key_heads, fitting = kBytesAtOnce / job.head_bytes;
    const int64_t group = smaller(units, fitting > threads ? fitting : threads < 1 ? 1 : threads);
    job.workspace = scratch<char>(Slot::kAttention, group * job.head_bytes);
    const int64_t row_blocks = blocks(job.queries, kernels.rows) * (job.heads / job.key_heads);
    for (; job.first_unit < units; job.first_unit += group) {
        const int64_t count = smaller(group, units - job.first_unit);
        job.units = count;
        const int64_t prepared = kernels.prepared_keys ? blocks(job.keys, kernels.prepared_keys) : count;
        run(kernels.prepare[element_type], job, prepared, count * job.keys * job.width * 8, threads);
        run(kernels.attend[element_type], job, count * row_blocks, count * job.queries * job.keys * job.width / 16, threads);
    }
}

}  // namespace
}  // namespace lowbit

using namespace lowbit;

// The number of this border.
LOWBIT_EXPORT int lowbit_abi() { return kAbi; }

// Bytes that the calling thread's last kOutOfMemory asked for; 0: not known.
LOWBIT_EXPORT int64_t lowbit_failed_bytes() { return failed_bytes; }

// Frees the scratch memory of all threads.
LOWBIT_EXPORT void lowbit_release_scratch() { release_scratch(); }

// Bytes of scratch memory that all threads hold.
LOWBIT_EXPORT int64_t lowbit_scratch_size() { return scratch_size(); }

// Sets the function that runs work in parallel (GOMP_parallel), or null for none.
LOWBIT_EXPORT void lowbit_set_parallel(void* function) { set_parallel(reinterpret_cast<Parallel>(function)); }

// Selects an instruction set (an Isa; negative: the best) and returns the one in use.
LOWBIT_EXPORT int lowbit_select_isa(int isa) {
    const int best = best_isa();
    selected() = kernel_set(isa < 0 || isa > best ? best : isa);
    return selected().isa;
}

LOWBIT_EXPORT int lowbit_selected_isa() { return selected().isa; }

// Whether lowbit_int8_product runs on this CPU, whatever is selected.
LOWBIT_EXPORT int lowbit_has_int8_product() { return has_vnni() && vnni_kernels(); }

// Whether what multiplies bfloat16 by AMX runs with the selected instruction set.
LOWBIT_EXPORT int lowbit_has_amx_products() { return selected().amx != nullptr; }

// Whether rows of bfloat16 are multiplied by decoded weights with the selected instruction set.
LOWBIT_EXPORT int lowbit_multiplies_bfloat16() { return selected().bf16 != nullptr; }

// Whether lowbit_gguf_product runs with the selected instruction set.
LOWBIT_EXPORT int lowbit_has_gguf_product() { return selected().base->gguf[0].multiply != nullptr; }

// input [positions, heads, width], or several of those -> output likewise: each width divided by the root of its mean square
// plus epsilon, if is_normalized; times weight [width] where there is one; its pairs, as complex numbers, times frequencies
// [positions, width / 2, 2], where there are any. width at most 8192.
LOWBIT_EXPORT int lowbit_normalize(const void* input, int element_type, int64_t rows, int64_t width, int is_normalized,
                                   float epsilon, const float* weight, const float* frequencies, int64_t heads, int64_t positions,
                                   void* output, int threads) {
    return guarded([&] {
        NormalizeJob job{};
        job.input = input, job.width = width, job.is_normalized = is_normalized != 0, job.epsilon = epsilon;
        job.weight = weight, job.frequencies = frequencies, job.heads = heads, job.positions = positions;
        job.output = output;
        run(selected().base->normalize[element_type], job, rows, rows * width, threads);
        return kOk;
    });
}

// silu(gate) * value of `count` elements.
LOWBIT_EXPORT int lowbit_gate(const void* gate, const void* value, int element_type, int64_t count, void* output, int threads) {
    return guarded([&] {
        GateJob job{};
        job.gate = gate, job.value = value, job.count = count, job.output = output;
        run(selected().base->gate[element_type], job, blocks(count, kElementsOfAPiece), count, threads);
        return kOk;
    });
}

// input [rows, columns] with rows `stride` elements apart -> output [rows, columns] dense,
// scale [ceil(rows / block_rows), ceil(columns / block_columns)].
LOWBIT_EXPORT int lowbit_quantize(const void* input, int element_type, int64_t rows, int64_t columns, int64_t stride,
                                  int64_t block_rows, int64_t block_columns, void* output, int code_type, float* scale,
                                  int threads) {
    return guarded([&] {
        constexpr int64_t kLarge = 4 << 20;  // allocators take such blocks from the system each time
        QuantizeJob job{};
        job.input = input, job.rows = rows, job.columns = columns, job.stride = stride;
        job.block_rows = block_rows, job.block_columns = block_columns;
        job.output = output, job.scale = scale, job.is_large = rows * columns >= kLarge;
        run(selected().base->quantize[element_type][code_type], job, blocks(rows, block_rows), rows * columns, threads);
        return kOk;
    });
}

// input [rows, columns], which is rows first_row.. of the matrix that scale belongs to -> output [rows, columns].
LOWBIT_EXPORT int lowbit_dequantize(const void* input, int code_type, int64_t rows, int64_t columns, int64_t first_row,
                                    int64_t block_rows, int64_t block_columns, const float* scale, void* output, int element_type,
                                    int threads) {
    return guarded([&] {
        DequantizeJob job{};
        job.input = input, job.rows = rows, job.columns = columns, job.first_row = first_row;
        job.block_rows = block_rows, job.block_columns = block_columns, job.scale = scale, job.output = output;
        const Kernel<DequantizeJob> kernel = selected().base->dequantize[code_type][element_type];
        if (!kernel) return kUnsupported;
        run(kernel, job, rows, rows * columns, threads);
        return kOk;
    });
}

// product [rows, columns] * row_scale [rows] * column_scale [columns] (+ bias [columns]) -> output [rows, columns], whose
// rows are output_stride elements apart. Without scales (both null) the product is only converted.
LOWBIT_EXPORT int lowbit_scale_product(const float* product, int64_t rows, int64_t columns, const float* row_scale,
                                       const float* column_scale, const float* bias, void* output, int64_t output_stride,
                                       int element_type, int threads) {
    return guarded([&] {
        ScaleJob job{};
        job.product = product, job.rows = rows, job.columns = columns, job.output_stride = output_stride;
        job.row_scale = row_scale, job.column_scale = column_scale, job.bias = bias, job.output = output;
        run(selected().base->scale_product[element_type], job, rows, rows * columns, threads);
        return kOk;
    });
}

// input [rows, columns / 2], two e2m1 codes a byte, the first in the low nibble -> output [rows, columns], times the scale
// [rows, ceil(columns / group_size)] of its group. columns and group_size are even.
LOWBIT_EXPORT int lowbit_decode_fp4(const uint8_t* input, int64_t rows, int64_t columns, int64_t group_size, const float* scale,
                                    void* output, int element_type, int threads) {
    return guarded([&] {
        Fp4Job job{};
        job.input = input, job.columns = columns, job.group_size = group_size, job.scale = scale, job.output = output;
        run(selected().base->decode_fp4[element_type], job, rows, rows * columns, threads);
        return kOk;
    });
}

// x uint8 [rows, depth] (int8 + 128) times weight int8 [columns, depth] -> output [rows, columns]: the exact integers, rounded to
// float32, times x_scale [rows] and weight_scale [columns], plus bias [columns] (or null), rounded to the output's type.
// columns % 16 == 0, depth % 4 == 0, depth <= kMostExactInputs.
LOWBIT_EXPORT int lowbit_int8_product(const uint8_t* x, int64_t rows, int64_t depth, const float* x_scale, const int8_t* weight,
                                      int64_t columns, const float* weight_scale, const float* bias, void* output,
                                      int element_type, int threads) {
    return guarded([&] {
        if (!has_vnni()) return kUnsupported;
        Int8Gemm gemm{};
        gemm.x = x, gemm.rows = rows, gemm.depth = depth, gemm.x_scale = x_scale;
        gemm.weight = weight, gemm.columns = columns, gemm.weight_scale = weight_scale, gemm.bias = bias;
        gemm.output = output, gemm.element_type = element_type;
        int8_gemm(gemm, threads);
        return kOk;
    });
}

// x [rows, depth], rows `stride` elements apart, quantized as lowbit_quantize does with a scale a row, and multiplied as by
// lowbit_int8_product with `count` weights -> their outputs [rows, columns], of the type of x. With is_gated, which needs
// lowbit_has_amx_products, two weights have one output: silu of the first result times the second, rounded once.
LOWBIT_EXPORT int lowbit_int8_linears(const void* x, int element_type, int64_t rows, int64_t depth, int64_t stride, int64_t count,
                                      const int8_t* const* weights, const int64_t* columns, const float* const* weight_scales,
                                      const float* const* biases, void* const* outputs, int is_gated, int threads) {
    return guarded([&] {
        const AmxKernels* const amx = selected().amx;
        if (!has_vnni() || (is_gated && !amx)) return kUnsupported;
        Int8Linears linears{};
        linears.x = x, linears.element_type = element_type, linears.rows = rows, linears.depth = depth;
        linears.stride = stride, linears.count = count, linears.weights = weights, linears.columns = columns;
        linears.weight_scales = weight_scales, linears.biases = biases, linears.outputs = outputs;
        linears.is_gated = is_gated != 0;
        if (amx) amx->int8_linears(linears, threads);
        else int8_linears(linears, threads);
        return kOk;
    });
}

// Attention: see AttentionJob. sizes: batch, queries, keys, heads, key_heads, width (at most 256); strides: three each of
// query, key and value; kind: an AttentionKind. kAttentionBFloat16 needs lowbit_has_amx_products, the others what
// lowbit_int8_product needs.
LOWBIT_EXPORT int lowbit_attention(const void* query, const void* key, const void* value, const uint8_t* keep, void* output,
                                   int element_type, const int64_t* sizes, const int64_t* strides, float scale, int is_causal,
                                   int kind, int threads) {
    return guarded([&] {
        const AmxKernels* const amx = selected().amx;
        if (kind == kAttentionBFloat16 ? !amx || element_type != kBFloat16 : !has_vnni()) return kUnsupported;
        const AttentionKernels& kernels = kind == kAttentionBFloat16 ? *amx->attention : vnni_kernels()->attention[kind];
        AttentionJob job{};
        job.query = query, job.key = key, job.value = value, job.keep = keep, job.output = output;
        job.query_stride = strides, job.key_stride = strides + 3, job.value_stride = strides + 6;
        job.batch = sizes[0], job.queries = sizes[1], job.keys = sizes[2];
        job.heads = sizes[3], job.key_heads = sizes[4], job.width = sizes[5];
        job.scale = scale, job.causal = is_causal != 0;
        attention(job, kernels, element_type, threads);
        return kOk;
    });
}

// x [rows, depth] float32 (see WeightJob) times weight [columns, depth] of weight_type (a WeightType; of 4 bits two inputs in
// a byte, the even one in the lower half) -> output [rows, columns], rounded once. rows <= 64. Scales (a ScaleType), and
// of int4 zero points, are one per block of block_rows x block_columns; of int4 block_rows is 1, block_columns a multiple
// of 32 that divides depth, and of each 32 activations the even ones come first, then the odd ones; of e2m1 block_rows is
// 1, depth and block_columns are even.
LOWBIT_EXPORT int lowbit_weight_only(const float* x, int64_t rows, int64_t x_stride, int64_t depth, const void* weight,
                                     int weight_type, int64_t columns, const void* scale, int scale_type, const void* zero_point,
                                     int64_t block_rows, int64_t block_columns, const float* outer_scale, int64_t outer_columns,
                                     const float* bias, void* output, int element_type, int threads) {
    return guarded([&] {
        WeightJob job{};
        job.x = x, job.rows = rows, job.x_stride = x_stride, job.depth = depth;
        job.weight = weight, job.columns = columns, job.scale = scale, job.scale_type = scale_type;
        job.zero_point = zero_point, job.block_rows = block_rows, job.block_columns = block_columns;
        job.outer_scale = outer_scale, job.outer_columns = outer_columns, job.bias = bias;
        job.output = output, job.element_type = element_type, job.is_split = weight_type == kWeightInt4;
        const KernelSet& set = selected();
        UnitRowsJob few{};
        few.weight = &job, few.x = x, few.rows = rows, few.x_stride = x_stride, few.depth = depth;
        few.columns = columns, few.bias = bias, few.output = output, few.element_type = element_type;
        const UnitRowsKernels* kernels = set.vnni ? set.vnni->weight_rows(job, weight_type) : nullptr;
        if (run_units(kernels, few, job.is_split ? kSplitFloat32 : kPlainFloat32, kFewRows, threads)) return kOk;
        const WeightKernels& base = set.base->weight;
        if (weight_type == kWeightE2M1) base.split(job);
        const int64_t tasks = blocks(columns, base.task_channels);
        run(base.multiply[weight_type], job, tasks, columns * depth / 4 * (4 + rows) / 4, threads);
        return kOk;
    });
}

// As above, of rows x [rows, depth] bfloat16, x_stride apart, in their own order (lowbit_multiplies_bfloat16); weights are
// rounded to bfloat16, the output is bfloat16. int8 has zero points, too, if depth and block_columns are multiples of 32.
// With rank != 0, weights of 4 bits, up to 64 rows and an even depth, low_x [rows, depth], low_x_stride apart, times down
// [depth, rank], rounded, times the transpose of up [columns, rank], all bfloat16, is added before the result is rounded
// (8-bit paths apply scales in the epilogue, which would scale the addend too).
LOWBIT_EXPORT int lowbit_weight_only_bfloat16(const void* x, int64_t rows, int64_t x_stride, int64_t depth, const void* weight,
                                              int weight_type, int64_t columns, const void* scale, int scale_type,
                                              const void* zero_point, int64_t block_rows, int64_t block_columns,
                                              const float* outer_scale, int64_t outer_columns, const float* bias, void* output,
                                              const void* low_x, int64_t low_x_stride, const void* down, const void* up,
                                              int64_t rank, int threads) {
    return guarded([&] {
        const KernelSet& set = selected();
        if (!set.bf16) return kUnsupported;
        WeightJob job{};
        job.depth = depth, job.weight = weight, job.columns = columns, job.scale = scale, job.scale_type = scale_type;
        job.zero_point = zero_point, job.block_rows = block_rows, job.block_columns = block_columns;
        job.outer_scale = outer_scale, job.outer_columns = outer_columns, job.element_type = kBFloat16;
        GemmArgs args{};
        args.input = x, args.rows = rows, args.depth = depth, args.stride = x_stride;
        args.weight.data = weight, args.weight.bias = bias, args.columns = columns, args.output = output;
        if (set.amx && !rank && set.amx->multiply_split(job, weight_type, args, threads)) return kOk;
        const UnitRowsKernels* kernels = set.bf16->weight_rows ? set.bf16->weight_rows(job, weight_type) : nullptr;
        if (!kernels && set.vnni) kernels = set.vnni->weight_rows(job, weight_type);
        args.low_rank.x = static_cast<const BFloat16*>(low_x), args.low_rank.x_stride = low_x_stride;
        args.low_rank.down = static_cast<const BFloat16*>(down), args.low_rank.up = static_cast<const BFloat16*>(up);
        args.low_rank.rank = rank;
        GemmArgs projected = args;
        projected.depth = 2 * depth;
        if (kernels && rank && rows <= set.bf16->max_unit_rows) set.bf16->project_low_rank(projected, threads);
        UnitRowsJob few{};
        few.weight = &job, few.x = x, few.rows = rows, few.x_stride = x_stride, few.depth = depth;
        few.columns = columns, few.bias = bias, few.output = output, few.element_type = kBFloat16;
        few.low_rank = projected.low_rank;
        if (run_units(kernels, few, kPlainBFloat16, set.bf16->max_unit_rows, threads)) return kOk;
        args.weight.data = &job;
        run_bfloat16(*set.bf16, args, set.bf16->weight_decoders[weight_type](job), threads);
        return kOk;
    });
}

// int4 [columns, depth] -> float32 [columns, depth], of each 32 inputs the even ones first, then the odd ones.
LOWBIT_EXPORT int lowbit_int4_decode(const void* weight, int64_t columns, int64_t depth, const void* scale, int scale_type,
                                     const uint8_t* zero_point, int64_t group_size, float* output, int threads) {
    return guarded([&] {
        WeightJob job{};
        job.depth = depth, job.weight = weight, job.columns = columns, job.scale = scale, job.scale_type = scale_type;
        job.zero_point = zero_point, job.block_rows = 1, job.block_columns = group_size;
        job.output = output, job.element_type = kFloat32, job.is_split = true;
        run(selected().base->weight.decode_int4, job, columns, columns * depth, threads);
        return kOk;
    });
}

// Blocks of a GGUF type [rows, bytes per row] -> output [rows, columns]. kUnsupported for a type that is not known or rows
// that are not whole blocks.
LOWBIT_EXPORT int lowbit_gguf_decode(const uint8_t* input, int type, int64_t rows, int64_t columns, int64_t row_bytes,
                                     void* output, int element_type, int threads) {
    return guarded([&] {
        const GgufKernels* kernels = gguf_kernels_of(type);
        if (!kernels || !is_row(*kernels, columns, row_bytes)) return kUnsupported;
        GgufJob job{};
        job.input = input, job.columns = columns, job.output = output, job.element_type = element_type;
        run(kernels->decode, job, rows, rows * columns, threads);
        return kOk;
    });
}

// x float32 [rows, columns] times the transpose of blocks [features, bytes per row], plus bias [features] (or null) ->
// output [rows, features], summed in float32. columns is a multiple of 32. Returns as lowbit_gguf_decode.
LOWBIT_EXPORT int lowbit_gguf_product(const float* x, int64_t rows, int64_t columns, const uint8_t* input, int type,
                                      int64_t features, int64_t row_bytes, const float* bias, void* output, int element_type,
                                      int threads) {
    return guarded([&] {
        const GgufKernels* kernels = gguf_kernels_of(type);
        if (!kernels || !is_row(*kernels, columns, row_bytes) || columns % 32 || !kernels->multiply) return kUnsupported;
        const VnniKernels* const vnni = selected().vnni;
        GgufRows weight{};
        weight.kernels = kernels, weight.input = input, weight.row_bytes = row_bytes;
        UnitRowsJob few{};
        few.weight = &weight, few.x = x, few.rows = rows, few.x_stride = few.depth = columns, few.columns = features;
        few.bias = bias, few.output = output, few.element_type = element_type;
        if (run_units(vnni ? vnni->gguf_rows(weight, columns) : nullptr, few, kPlainFloat32, kFewRows, threads)) return kOk;
        GgufProductJob job{};
        job.x = x, job.rows = rows, job.columns = columns, job.features = features;
        job.input = input, job.bias = bias, job.output = output, job.element_type = element_type;
        run(kernels->multiply, job, blocks(features, 4), features * columns, threads);
        return kOk;
    });
}

// As above, of rows x bfloat16, which need lowbit_multiplies_bfloat16; weights are rounded to bfloat16, the output is bfloat16.
LOWBIT_EXPORT int lowbit_gguf_product_bfloat16(const void* x, int64_t rows, int64_t columns, const uint8_t* input, int type,
                                               int64_t features, int64_t row_bytes, const float* bias, void* output,
                                               int threads) {
    return guarded([&] {
        const KernelSet& set = selected();
        const GgufKernels* kernels = gguf_kernels_of(type);
        if (!set.bf16 || !kernels || !is_row(*kernels, columns, row_bytes)) return kUnsupported;
        GgufRows weight{};
        weight.kernels = kernels, weight.input = input, weight.row_bytes = row_bytes;
        UnitRowsJob few{};
        few.weight = &weight, few.x = x, few.rows = rows, few.x_stride = few.depth = columns, few.columns = features;
        few.bias = bias, few.output = output, few.element_type = kBFloat16;
        const UnitRowsKernels* units = set.vnni ? set.vnni->gguf_rows(weight, columns) : nullptr;
        if (run_units(units, few, kPlainBFloat16, set.bf16->max_unit_rows, threads)) return kOk;
        GemmArgs args{};
        args.input = x, args.rows = rows, args.depth = args.stride = columns;
        args.weight.data = &weight, args.weight.bias = bias, args.columns = features, args.output = output;
        run_bfloat16(*set.bf16, args, set.bf16->gguf_decoder(weight), threads);
        return kOk;
    });
}
