// Quantizing, dequantizing and scaling rows on CPUs, for lowbit.ops.cpu.native, which calls it through ctypes.
//
// It knows nothing of torch: pointers and sizes come in, so one build serves every torch version. Work is shared among
// torch's own OpenMP threads, whose entry point is handed over at run time (a second OpenMP library would bring a second
// pool of threads, and the two would fight for the cores).

#include <atomic>
#include <cstdint>
#include <cstring>
#include <vector>

#if (defined(__x86_64__) || defined(_M_X64)) && (defined(__GNUC__) || defined(__clang__))
#define LOWBIT_X86 1
#include <immintrin.h>
#endif

#if defined(__GNUC__) || defined(__clang__)
#define LOWBIT_INLINE static inline __attribute__((always_inline))
#define LOWBIT_EXPORT extern "C" __attribute__((visibility("default")))
#else
#define LOWBIT_INLINE static inline
#define LOWBIT_EXPORT extern "C" __declspec(dllexport)
#endif

namespace {

struct BFloat16 { uint16_t bits; };
struct Half { uint16_t bits; };
struct Int8 {
    uint8_t bits;
    static constexpr float largest = 127.0f;
    static constexpr bool integer = true;
};
struct Uint8 {  // int8 + 128
    uint8_t bits;
    static constexpr float largest = 127.0f;
    static constexpr bool integer = true;
};
struct E4M3 {
    uint8_t bits;
    static constexpr float largest = 448.0f;
    static constexpr bool integer = false;
};

struct QuantizeJob {
    const void* input;
    int64_t rows, columns, stride, block_rows, block_columns;
    void* output;
    float* scale;
};

struct DequantizeJob {
    const void* input;
    int64_t rows, columns, first_row, block_rows, block_columns;
    const float* scale;
    void* output;
};

struct ScaleJob {
    const float* product;
    int64_t rows, columns, output_stride;
    const float *row_scale, *column_scale, *bias;
    void* output;
};

struct Fp4Job {
    const uint8_t* input;  // [rows, columns / 2], two e2m1 codes a byte
    int64_t columns, group_size;
    const float* scale;  // [rows, ceil(columns / group_size)]
    void* output;  // [rows, columns]
};

constexpr int64_t kPanelChannels = 16;
constexpr int64_t kLargestRowBlock = 251;  // with the row of ones in whole tiles; the sums take 63 KiB of stack

struct PackJob {
    const int8_t* input;
    int8_t* output;  // may be the input
    int64_t depth;
};

struct ProductJob {
    const uint8_t* x;      // [rows, depth], int8 + 128
    const float* x_scale;  // [rows]
    const int8_t* weight;  // packed
    const float *weight_scale, *bias;  // [columns]
    int64_t rows, columns, depth, row_block, row_blocks;
    void* output;  // [rows, columns]
};

// Indices: element type (float32, bfloat16, float16), code type (int8, uint8, e4m3; decoding int8, e4m3).
struct Kernels {
    void (*quantize[3][3])(const QuantizeJob&, int64_t, int64_t);
    void (*dequantize[2][3])(const DequantizeJob&, int64_t, int64_t);
    void (*scale_product[3])(const ScaleJob&, int64_t, int64_t);
    void (*decode_fp4[3])(const Fp4Job&, int64_t, int64_t);
};

LOWBIT_INLINE float as_float(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

LOWBIT_INLINE uint32_t as_bits(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

LOWBIT_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
LOWBIT_INLINE int64_t blocks(int64_t count, int64_t size) { return (count + size - 1) / size; }

namespace generic {
#include "kernels.h"
}

#ifdef LOWBIT_X86
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif
namespace avx2 {
#include "kernels.h"
}
#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,prefer-vector-width=512"))), \
                             apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,prefer-vector-width=512")
#endif
#define LOWBIT_AVX512 1
namespace avx512 {
#include "kernels.h"
}
#undef LOWBIT_AVX512
#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push( \
    __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,prefer-vector-width=512"))), apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,prefer-vector-width=512")
#endif
namespace avx512_vnni {
#include "int8_product.h"
}
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif

enum Isa { kGeneric = 0, kAvx2 = 1, kAvx512 = 2 };

int best_isa() {
#ifdef LOWBIT_X86
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq"))
        return kAvx512;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return kAvx2;
#endif
    return kGeneric;
}

const Kernels* kernels_of(int isa) {
#ifdef LOWBIT_X86
    if (isa == kAvx512) return &avx512::kernels;
    if (isa == kAvx2) return &avx2::kernels;
#endif
    return &generic::kernels;
}

int selected_isa = best_isa();
const Kernels* selected = kernels_of(selected_isa);

// GNU OpenMP's entry point: runs function(data) on that many threads of the caller's pool.
using Parallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
Parallel parallel = nullptr;

template <typename Job>
struct Shared {
    void (*kernel)(const Job&, int64_t, int64_t);
    const Job* job;
    int64_t count, step;
    std::atomic<int64_t> next;
};

// Threads take pieces from a common counter, so a thread whose core is busy elsewhere holds nobody up.
template <typename Job>
void take_pieces(void* data) {
    auto& shared = *static_cast<Shared<Job>*>(data);
    for (;;) {
        const int64_t first = shared.next.fetch_add(shared.step);
        if (first >= shared.count) return;
        shared.kernel(*shared.job, first, smaller(first + shared.step, shared.count));
    }
}

constexpr int64_t kElementsWorthAThread = 1 << 15;  // about 10 microseconds of work
constexpr int64_t kElementsPerPiece = 1 << 16;

template <typename Job>
void run(void (*kernel)(const Job&, int64_t, int64_t), const Job& job, int64_t count, int64_t elements, int threads) {
    if (count <= 0) return;
    if (parallel == nullptr || threads < 2 || count < 2 || elements < 2 * kElementsWorthAThread) {
        kernel(job, 0, count);
        return;
    }
    const int64_t pieces = blocks(elements, kElementsPerPiece);
    const int64_t wanted = pieces < 4 * threads ? 4 * threads : pieces;
    Shared<Job> shared{kernel, &job, count, blocks(count, wanted), {0}};
    const int64_t useful = smaller(threads, blocks(elements, kElementsWorthAThread));
    parallel(take_pieces<Job>, &shared, static_cast<unsigned>(useful), 0);
}

// Panels [first, last): int8 [16, depth] -> [depth / 4][16][4].
void pack_panels(const PackJob& job, int64_t first, int64_t last) {
    std::vector<int8_t> copy(kPanelChannels * job.depth);
    for (int64_t panel = first; panel < last; ++panel) {
        std::memcpy(copy.data(), job.input + panel * copy.size(), copy.size());
        int8_t* to = job.output + panel * copy.size();
        for (int64_t i = 0; i < job.depth; i += 4)
            for (int64_t channel = 0; channel < kPanelChannels; ++channel, to += 4)
                std::memcpy(to, copy.data() + channel * job.depth + i, 4);
    }
}

// The inverse; not in place.
void unpack_panels(const PackJob& job, int64_t first, int64_t last) {
    const int64_t size = kPanelChannels * job.depth;
    for (int64_t panel = first; panel < last; ++panel) {
        const int8_t* from = job.input + panel * size;
        int8_t* to = job.output + panel * size;
        for (int64_t i = 0; i < job.depth; i += 4)
            for (int64_t channel = 0; channel < kPanelChannels; ++channel, from += 4)
                std::memcpy(to + channel * job.depth + i, from, 4);
    }
}

}  // namespace

// Set the function that runs work in parallel (GOMP_parallel), or null for none.
LOWBIT_EXPORT void lowbit_set_parallel(void* function) { parallel = reinterpret_cast<Parallel>(function); }

// Select an instruction set (0 generic, 1 AVX2, 2 AVX-512; negative: the best) and return the one in use.
LOWBIT_EXPORT int lowbit_select_isa(int isa) {
    const int best = best_isa();
    selected_isa = isa < 0 || isa > best ? best : isa;
    selected = kernels_of(selected_isa);
    return selected_isa;
}

// input [rows, columns] with rows `stride` elements apart -> output [rows, columns] dense,
// scale [ceil(rows / block_rows), ceil(columns / block_columns)].
LOWBIT_EXPORT void lowbit_quantize(const void* input, int element_type, int64_t rows, int64_t columns, int64_t stride,
                                   int64_t block_rows, int64_t block_columns, void* output, int code_type,
                                   float* scale, int threads) {
    const QuantizeJob job{input, rows, columns, stride, block_rows, block_columns, output, scale};
    run(selected->quantize[element_type][code_type], job, blocks(rows, block_rows), rows * columns, threads);
}

// input [rows, columns], which is rows first_row.. of the matrix that scale belongs to -> output [rows, columns].
LOWBIT_EXPORT void lowbit_dequantize(const void* input, int code_type, int64_t rows, int64_t columns,
                                     int64_t first_row, int64_t block_rows, int64_t block_columns, const float* scale,
                                     void* output, int element_type, int threads) {
    const DequantizeJob job{input, rows, columns, first_row, block_rows, block_columns, scale, output};
    run(selected->dequantize[code_type == 2 ? 1 : 0][element_type], job, rows, rows * columns, threads);
}

// product [rows, columns] * row_scale [rows] * column_scale [columns] (+ bias [columns]) -> output [rows, columns], whose
// rows are output_stride elements apart. Without scales (both null) the product is only converted.
LOWBIT_EXPORT void lowbit_scale_product(const float* product, int64_t rows, int64_t columns, const float* row_scale,
                                        const float* column_scale, const float* bias, void* output,
                                        int64_t output_stride, int element_type, int threads) {
    const ScaleJob job{product, rows, columns, output_stride, row_scale, column_scale, bias, output};
    run(selected->scale_product[element_type], job, rows, rows * columns, threads);
}

// input [rows, columns / 2], two e2m1 codes a byte, the first in the low nibble -> output [rows, columns], times the scale
// [rows, ceil(columns / group_size)] of its group. columns and group_size are even.
LOWBIT_EXPORT void lowbit_decode_fp4(const uint8_t* input, int64_t rows, int64_t columns, int64_t group_size,
                                     const float* scale, void* output, int element_type, int threads) {
    const Fp4Job job{input, columns, group_size, scale, output};
    run(selected->decode_fp4[element_type], job, rows, rows * columns, threads);
}

// Whether lowbit_int8_product runs on this CPU.
LOWBIT_EXPORT int lowbit_has_int8_product() {
#ifdef LOWBIT_X86
    return best_isa() == kAvx512 && __builtin_cpu_supports("avx512vnni");
#else
    return 0;
#endif
}

// int8 [columns, depth] -> the same bytes in panels for lowbit_int8_product, possibly in place. columns % 16 == 0,
// depth % 4 == 0.
LOWBIT_EXPORT void lowbit_int8_pack(const int8_t* input, int64_t columns, int64_t depth, int8_t* output, int threads) {
    const PackJob job{input, output, depth};
    run(pack_panels, job, columns / kPanelChannels, columns * depth, threads);
}

// The inverse, not in place.
LOWBIT_EXPORT void lowbit_int8_unpack(const int8_t* input, int64_t columns, int64_t depth, int8_t* output,
                                      int threads) {
    const PackJob job{input, output, depth};
    run(unpack_panels, job, columns / kPanelChannels, columns * depth, threads);
}

// x uint8 [rows, depth] (int8 + 128) times a packed weight -> output [rows, columns]: the exact integers, rounded to
// float32, times x_scale [rows] and weight_scale [columns], plus bias [columns] (or null), rounded to the output's type.
// depth <= 2**17, so that no sum leaves int32.
LOWBIT_EXPORT void lowbit_int8_product(const uint8_t* x, int64_t rows, int64_t depth, const float* x_scale,
                                       const int8_t* weight, int64_t columns, const float* weight_scale,
                                       const float* bias, void* output, int element_type, int threads) {
#ifdef LOWBIT_X86
    if (rows <= 0) return;
    const int64_t groups = blocks(columns, avx512_vnni::kTileColumns);
    // Blocks of rows small enough to give every thread several tasks, in whole tiles together with the row of ones.
    const int64_t wanted = blocks(4 * threads, groups);
    const int64_t tiles = blocks(blocks(rows, wanted) + 1, avx512_vnni::kTileRows);
    const int64_t block = smaller(tiles * avx512_vnni::kTileRows - 1, kLargestRowBlock);
    const int64_t row_blocks = blocks(rows, block);
    const ProductJob job{x, x_scale, weight, weight_scale, bias, rows, columns, depth, block, row_blocks, output};
    constexpr int64_t kProductsPerElement = 64;  // multiply-adds in the time of one element of the other kernels
    const int64_t work = rows * columns * depth / kProductsPerElement;
    run(avx512_vnni::multiplications[element_type], job, groups * row_blocks, work, threads);
#endif
}
