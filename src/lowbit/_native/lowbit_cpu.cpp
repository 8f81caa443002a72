// Quantizing, dequantizing and scaling rows on CPUs, for lowbit.ops.cpu.native, which calls it through ctypes.
//
// It knows nothing of torch: pointers and sizes come in, so one build serves every torch version. Work is shared among
// torch's own OpenMP threads, whose entry point is handed over at run time (a second OpenMP library would bring a second
// pool of threads, and the two would fight for the cores).

#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>

#if (defined(__x86_64__) || defined(_M_X64)) && (defined(__GNUC__) || defined(__clang__))
#define LOWBIT_X86 1
#include <immintrin.h>
#elif defined(__aarch64__) && (defined(__GNUC__) || defined(__clang__))
#define LOWBIT_NEON 1
#include <arm_neon.h>
#endif

#if defined(__GNUC__) || defined(__clang__)
#define LOWBIT_INLINE static inline __attribute__((always_inline))
#define LOWBIT_INLINE_LAMBDA __attribute__((always_inline))
#define LOWBIT_NOINLINE __attribute__((noinline))
#define LOWBIT_EXPORT extern "C" __attribute__((visibility("default")))
#else
#define LOWBIT_INLINE static inline
#define LOWBIT_EXPORT extern "C" __declspec(dllexport)
#endif

#if defined(__linux__)
#include <sys/mman.h>
#endif

#if defined(LOWBIT_X86) && (defined(__clang__) ? __clang_major__ >= 9 : __GNUC__ >= 10)
#define LOWBIT_BFLOAT16 1
#include <cpuid.h>
#endif

// Linux gives a process the registers of AMX at its request.
#if defined(LOWBIT_BFLOAT16) && defined(__linux__) && (defined(__clang__) ? __clang_major__ >= 12 : __GNUC__ >= 11)
#define LOWBIT_AMX 1
#include <sys/syscall.h>
#include <unistd.h>
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
    bool is_large;
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

constexpr int64_t kLargestNormalized = 8192;
constexpr int64_t kElementsOfAPiece = 4096;

struct NormalizeJob {
    const void* input;  // [rows, width]
    int64_t width;
    bool is_normalized;  // divided by the root of the mean square plus epsilon
    float epsilon;
    const float* weight;       // [width], or null
    const float* frequencies;  // [positions, width]: cosine and sine of each pair of values, or null
    int64_t heads, positions;  // row r has position r / heads % positions
    void* output;              // [rows, width]
};

struct GateJob {
    const void *gate, *value;
    int64_t count;
    void* output;
};

struct ElementwiseKernels {  // by element type
    void (*normalize[3])(const NormalizeJob&, int64_t, int64_t);
    void (*gate[3])(const GateJob&, int64_t, int64_t);
};

constexpr int64_t kPanelChannels = 16;
constexpr int64_t kLargestRowBlock = 1151;  // with the row of ones in whole tiles; a thread's sums take 288 KiB

constexpr int64_t kMostExactInputs = int64_t{1} << 17;  // of which no sum of products of int8 leaves int32
constexpr int64_t kMostRowsAlong = 12;  // of int8 that are multiplied along the inputs; of more, packing costs less than it saves
constexpr int64_t kFewRows = 4;         // of floating point

struct ProductJob {
    const uint8_t* x;      // [rows, depth], int8 + 128
    const float* x_scale;  // [rows]
    const int8_t* weight;  // [columns, depth]
    const float *weight_scale, *bias;  // [columns]
    int64_t rows, columns, depth, row_block, row_blocks;
    void* output;  // [rows, columns]
    int64_t call;  // a number of its own
};

struct TileWeight {
    const void* data;                  // [columns, depth]; or what `decode` takes
    const float *column_scale, *bias;  // [columns]; either may be null, the scale of int8 is there
};

struct TileJob;
using TileKernel = void (*)(const TileJob&, int64_t, int64_t);

// How a weight is brought to bfloat16.
struct BFloat16Decoder {
    // Writes inputs [first, first + count) of a channel; first is a multiple of 256, count at most 2048.
    void (*decode)(const void* weight, int64_t channel, int64_t first, int64_t count, BFloat16* output);
    TileKernel multiply_few_rows;  // the same within a product
    const uint16_t* order;  // input order[i] of each 32 is written as the i-th, or null: as they lie
    const void* codes;
    int64_t row_bytes, bytes_of_256;  // of a channel, and of 256 inputs of one
    const float* channel_scale;       // [channels], which the sums are to be multiplied with; or null
};

// x [rows, depth] times down [depth, rank] times the transpose of up [columns, rank], added to a product of few rows.
struct LowRank {
    const BFloat16* x;
    int64_t x_stride;
    const BFloat16 *down, *up;
    int64_t rank;      // 0: there is none
    float* partial;    // see amx_low_rank.h
    BFloat16* hidden;  // x times down
    uint8_t* tiles;    // the same as TileJob's tiles
};

constexpr int64_t kUnit = 128;         // inputs
constexpr int64_t kUnitChannels = 16;  // of a task

// Up to kFewRows rows times a weight that is multiplied as it is read (unit_rows.h).
struct UnitRowsJob {
    const void* weight;  // what the kernels' weight is made of
    const void* x;       // [rows, depth], x_stride elements apart
    int64_t rows, x_stride, depth, columns;
    void* units;         // [rows, depth / kUnit] of what `arrange` makes of the activations
    float* unit_floats;  // likewise, some for each; apart, so that units leave more of the first-level cache
    const float* bias;   // [columns], or null
    void* output;        // [rows, columns]
    int element_type;
    LowRank low_rank;  // its hidden [rows, rank] and up are used
};

using UnitRowsKernel = void (*)(const UnitRowsJob&, int64_t, int64_t);

struct UnitRowsKernels {
    // Of float32 in the order of split activations, and as they are: float32, bfloat16. Only the last may be there.
    UnitRowsKernel arrange[3];
    const UnitRowsKernel* multiply;  // by the number of rows, less one
    int64_t unit_bytes, unit_floats;
};

// Scales, and zero points, of groups of a weight's inputs, and of UnitJob's units.
struct GroupScales {
    const void *scales, *zero_points;         // [channels][groups]; the second may be null
    int64_t per_channel, inputs, unit_steps;  // groups of a channel, inputs of a group, 64 of them of a unit
    const float *row_scales, *row_sums;       // UnitJob's
};

struct TileJob {
    const void* input;  // [rows, depth]
    int64_t rows, depth, stride;  // depth in bytes of what is multiplied; rows are `stride` apart, in bytes or, where they
                                  // are quantized first, in elements
    float* row_scale;    // [rows], of int8; null where it is found by quantizing
    uint8_t* tiles;      // what is multiplied, as the instruction reads it: whole tiles of 32 rows and 64 bytes
    TileWeight weight, gated;  // the second null, or multiplied with silu of the first one's result
    int64_t columns;
    void* output;  // [rows, columns]
    int64_t row_block, row_blocks;
    const BFloat16Decoder* decoder;  // null for weights that are multiplied as they are
    int64_t call;  // a number of its own
    LowRank low_rank = {};
    const GroupScales* groups = nullptr;
};

struct SplitJob {
    const BFloat16* x;  // [rows, depth], rows `stride` apart
    int64_t rows, depth, stride;
    int8_t* codes;     // [3][rows, depth]
    float* row_scale;  // [rows]
};

constexpr int64_t kMostRows = 64;

struct UnitJob {
    const BFloat16* x;  // [rows, depth], rows `stride` apart
    int64_t rows, depth, stride, inputs;  // the last of a unit
    bool is_even_first, has_sums;
    float scale;           // that all are to be multiplied with
    int8_t* codes;         // [2][rows, depth]
    float *scales, *sums;  // [units][kMostRows], of which the first are those of the codes [2][rows]
};

constexpr int64_t kMostVectorRows = 252;  // of bfloat16 without AMX that a task multiplies, in whole tiles

struct WeightJob {
    const float* x;  // [rows, depth], rows x_stride apart and filled with zeros up to a multiple of 32
    int64_t rows, x_stride, depth;
    const void* weight;  // [columns, depth] codes
    int64_t columns;
    const void* scale;  // one per block of the weight
    int scale_type;     // 0 float32, 1 bfloat16, 2 E8M0, 3 e4m3
    const void* zero_point;  // likewise: uint8 of int4, int16 of int8; or null: 8 and 0
    int64_t block_rows, block_columns;
    const float* outer_scale;  // multiplied with the scale: one per row and outer_columns (of 512 or a
                               // multiple), one at all (0), or null
    int64_t outer_columns;
    const float* bias;  // [columns], or null
    void* output;       // [rows, columns]
    int element_type;
    bool is_split;  // of each 32 activations the even ones come first, then the odd ones; of int4 always
};

struct WeightKernels {
    void (*multiply[4])(const WeightJob&, int64_t, int64_t);  // int8, e4m3, int4, e2m1
    void (*decode_int4)(const WeightJob&, int64_t, int64_t);
    void (*split)(WeightJob&);  // the activations of e2m1, where that is faster; they live as long as the calling thread
    int64_t task_channels;
};

constexpr int kAttentionKinds = 4;  // float32, int8, e4m3, int16

struct AttentionJob {
    const void *query, *key, *value;  // [batch, tokens, heads, width], strides of the first three in elements
    const int64_t *query_stride, *key_stride, *value_stride;
    const uint8_t* keep;  // [batch, keys], or null: all
    void* output;         // [batch, queries, heads, width], dense
    int64_t batch, queries, keys, heads, key_heads, width;
    float scale;  // of the scores, in powers of two
    bool causal;
    int64_t first_unit, units;  // (batch, key head) that the workspace begins with, and how many it holds
    char* workspace;
    int64_t head_bytes;
};

struct AttentionKernels {
    int64_t (*head_bytes)(const AttentionJob&);
    void (*prepare[3])(const AttentionJob&, int64_t, int64_t);  // by element type
    void (*attend[3])(const AttentionJob&, int64_t, int64_t);
    int64_t rows;
    int64_t prepared_keys;  // of all heads that a task prepares; 0: all keys of a head
};

struct GgufJob {
    const uint8_t* input;  // [rows, bytes per row]
    int64_t columns;
    void* output;  // [rows, columns]
};

struct GgufProductJob {
    const float* x;  // [rows, columns]
    int64_t rows, columns, features;
    const uint8_t* input;  // [features, bytes per row]
    const float* bias;     // [features] or null
    void* output;          // [rows, features]
};

// Of one block type; the indices are element types (float32, bfloat16, float16).
struct GgufKernels {
    int number, elements, bytes;
    void (*decode[3])(const GgufJob&, int64_t, int64_t);
    void (*multiply[3])(const GgufProductJob&, int64_t, int64_t);  // null where the instruction set has none
};

struct GgufRows {
    const GgufKernels* kernels;
    const uint8_t* input;
    int64_t row_bytes;
};

// Of bfloat16 times weights decoded to it.
struct BFloat16Kernels {
    BFloat16Decoder (*weight_decoders[4])(const WeightJob&);  // int8, e4m3, int4, e2m1
    BFloat16Decoder (*gguf_decoder)(const GgufRows&);
    TileKernel transpose_rows;                   // of few rows
    int64_t (*channels_of_group)(int64_t rows);  // that multiply_few_rows counts in
    TileKernel project_rows;
    void (*add_pieces)(const TileJob&, int64_t pieces);
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

// Whether a weight's scales are of whole channels, so that its decoder may leave them to the sums.
bool has_channel_scales(const WeightJob& job) {
    return job.scale_type == 0 && job.block_columns >= job.depth && !job.outer_scale;
}

// The scales of channels, for as long as the calling thread does not ask again.
const float* channel_scales(const WeightJob& job) {
    static thread_local std::vector<float> scales;
    scales.resize(static_cast<size_t>(job.columns));
    for (int64_t channel = 0; channel < job.columns; ++channel)
        scales[static_cast<size_t>(channel)] = static_cast<const float*>(job.scale)[channel / job.block_rows];
    return scales.data();
}

#ifdef LOWBIT_X86
// Loads spread an element over a register at no cost. Compilers that know where it comes from permute registers instead, in
// the unit that looking codes up waits for.
template <typename Element>
LOWBIT_INLINE void keep_in_memory(Element (&elements)[16]) {
    __asm__("" : "+m"(elements));
}
#endif

// Let the system give the pages of what is about to be written at once, instead of by a fault for each: of 600 MB of fresh
// memory it gives 3.2 GB a second so, and 2.2 by faults. Pages that are there stay as they are. Linux 5.14; before, nothing.
LOWBIT_INLINE void populate(void* memory, int64_t size) {
#if defined(__linux__)
    constexpr uintptr_t kPage = 4096;
    constexpr int kPopulateWrite = 23;  // MADV_POPULATE_WRITE, which older headers lack
    const uintptr_t begin = reinterpret_cast<uintptr_t>(memory) & ~(kPage - 1);
    madvise(reinterpret_cast<void*>(begin), reinterpret_cast<uintptr_t>(memory) + size - begin, kPopulateWrite);
#endif
}

namespace generic {
#include "kernels.h"
#include "elementwise.h"
#include "weight_only.h"
#include "gguf_blocks.h"
#include "gguf.h"
}

#ifdef LOWBIT_X86
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif
#define LOWBIT_AVX2 1
namespace avx2 {
#include "kernels.h"
#include "elementwise.h"
#include "weight_only.h"
#include "gguf_blocks.h"
#include "gguf.h"
}
#undef LOWBIT_AVX2
#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq"))), \
                             apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,prefer-vector-width=512")
#endif
#define LOWBIT_AVX512 1
namespace avx512 {
#include "kernels.h"
#include "elementwise.h"
#include "weight_only.h"
#include "gguf_blocks.h"
#include "gguf.h"
}
#undef LOWBIT_AVX512
#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push( \
    __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni"))), apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,prefer-vector-width=512")
#endif
namespace avx512_vnni {
#include "vector_tiles.h"
#include "int8_product.h"
#include "attention.h"
#include "attention_float32.h"
#include "attention_integers.h"
using avx512::E2M1;
using avx512::Int4;
using avx512::narrow;
using avx512::widen;
#include "integer_rows.h"
#include "integer_gguf.h"

template <typename Kind>
constexpr AttentionKernels integer_attention = {
    head_bytes<typename Kind::Element>,
    {prepare_integers<Kind, float>, prepare_integers<Kind, BFloat16>, prepare_integers<Kind, Half>},
    {attend_integers<Kind, float>, attend_integers<Kind, BFloat16>, attend_integers<Kind, Half>},
    kIntegerRows, 0};

constexpr AttentionKernels attentions[kAttentionKinds] = {
    {head_bytes<float>,
     {prepare_float<float, false>, prepare_float<BFloat16, false>, prepare_float<Half, false>},
     {attend_float<float, false>, attend_float<BFloat16, false>, attend_float<Half, false>},
     kFloatRows, 0},
    integer_attention<Attention8>,
    {head_bytes<float>,
     {prepare_float<float, true>, prepare_float<BFloat16, true>, prepare_float<Half, true>},
     {attend_float<float, true>, attend_float<BFloat16, true>, attend_float<Half, true>},
     kFloatRows, 0},
    integer_attention<Attention16>,
};
}
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#ifdef LOWBIT_BFLOAT16
#if defined(__clang__)
#pragma clang attribute push( \
    __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512vbmi,avx512bf16"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512vbmi,avx512bf16,prefer-vector-width=512")
#endif
namespace avx512_bf16 {
using avx512_vnni::kBytesAhead;
using avx512_vnni::kStep;
using avx512_vnni::lane_numbers;
using avx512_vnni::pack_step;
using avx512_vnni::present;
using avx512::narrow;
using avx512::store_narrow;
using avx512::widen;
#include "bfloat16_rows.h"
#include "bfloat16_few_rows.h"
#include "vector_tiles.h"
#include "bfloat16_product.h"
#include "bfloat16_kernels.h"
#include "bfloat16_units.h"
}
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
#ifdef LOWBIT_AMX
#if defined(__clang__)
#pragma clang attribute push( \
    __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512vbmi,avx512bf16,amx-tile,amx-int8,amx-bf16"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512vbmi,avx512bf16,amx-tile,amx-int8,amx-bf16,prefer-vector-width=512")
#endif
namespace amx {
using avx512_vnni::kStep;
using avx512_vnni::pack_step;
using avx512::Int4;
using avx512::store_narrow;
using avx512::widen;
using avx512_vnni::present;
using avx512_vnni::causal_bits;
using avx512_vnni::head_input;
using avx512_vnni::kBlockKeys;
using avx512_vnni::keep_bits;
using avx512_vnni::kLargestWidth;
using avx512_vnni::kNoScore;
using avx512_vnni::kRowsAhead;
using avx512_vnni::poison_of;
using avx512_vnni::prefetch_row;
using avx512_vnni::Queries;
#define LOWBIT_TILES 1
#include "bfloat16_rows.h"
#include "amx_product.h"
#include "amx_few_rows.h"
#include "amx_int8_few_rows.h"
#include "amx_grouped_rows.h"
#include "bfloat16_kernels.h"
#undef LOWBIT_TILES
#include "attention_amx.h"
}
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
#endif

enum Isa { kGeneric = 0, kAvx2 = 1, kAvx512 = 2, kAvx512BFloat16 = 3, kAmx = 4 };  // each has what those before it have

#ifdef LOWBIT_BFLOAT16
// Whether the CPU has all that the namespace avx512_bf16 is compiled for, beyond AVX-512.
bool has_vector_bfloat16() {
    unsigned a, b, c, d;
    constexpr unsigned kVectorBFloat16 = 1u << 5;
    if (!__builtin_cpu_supports("avx512vnni") || !__builtin_cpu_supports("avx512vbmi")) return false;
    return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & kVectorBFloat16);
}
#else
bool has_vector_bfloat16() { return false; }
#endif

#ifdef LOWBIT_AMX
// Whether the CPU has AMX for both types, and what goes with it, and the system lets this process use it.
bool has_amx() {
    unsigned a, b, c, d;
    constexpr unsigned kBFloat16 = 1u << 22, kTile = 1u << 24, kInt8 = 1u << 25, kAll = kBFloat16 | kTile | kInt8;
    if (!has_vector_bfloat16() || !__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & kAll) != kAll) return false;
    constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
#else
bool has_amx() { return false; }
#endif

int best_isa() {
#ifdef LOWBIT_X86
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq"))
        return has_amx() ? kAmx : has_vector_bfloat16() ? kAvx512BFloat16 : kAvx512;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return kAvx2;  // and F16C, older than both
#endif
    return kGeneric;
}

const Kernels* kernels_of(int isa) {
#ifdef LOWBIT_X86
    if (isa >= kAvx512) return &avx512::kernels;
    if (isa == kAvx2) return &avx2::kernels;
#endif
    return &generic::kernels;
}

const WeightKernels* weight_kernels_of(int isa) {
#ifdef LOWBIT_X86
    if (isa >= kAvx512) return &avx512::weight_kernels;
    if (isa == kAvx2) return &avx2::weight_kernels;
#endif
    return &generic::weight_kernels;
}

const ElementwiseKernels* elementwise_kernels_of(int isa) {
#ifdef LOWBIT_X86
    if (isa >= kAvx512) return &avx512::elementwise;
    if (isa == kAvx2) return &avx2::elementwise;
#endif
    return &generic::elementwise;
}

const GgufKernels* gguf_kernels_of(int isa, int number) {
    const GgufKernels* found = generic::gguf_kernels;
#ifdef LOWBIT_X86
    if (isa >= kAvx512) found = avx512::gguf_kernels;
    if (isa == kAvx2) found = avx2::gguf_kernels;
#endif
    for (int i = 0; i < generic::kGgufTypes; ++i)
        if (found[i].number == number) return found + i;
    return nullptr;
}

bool is_row(const GgufKernels& kernels, int64_t columns, int64_t row_bytes) {
    return columns % kernels.elements == 0 && columns / kernels.elements * kernels.bytes == row_bytes;
}

int selected_isa = best_isa();
const Kernels* selected = kernels_of(selected_isa);
const WeightKernels* selected_weight = weight_kernels_of(selected_isa);
const ElementwiseKernels* selected_elementwise = elementwise_kernels_of(selected_isa);

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

// Pieces are multiples of `unit`.
template <typename Job>
void run(void (*kernel)(const Job&, int64_t, int64_t), const Job& job, int64_t count, int64_t elements, int threads,
         int64_t unit = 1) {
    if (count <= 0) return;
    if (parallel == nullptr || threads < 2 || count < 2 || elements < 2 * kElementsWorthAThread) {
        kernel(job, 0, count);
        return;
    }
    const int64_t pieces = blocks(elements, kElementsPerPiece);
    const int64_t wanted = pieces < 4 * threads ? 4 * threads : pieces;
    Shared<Job> shared{kernel, &job, count, blocks(blocks(count, wanted), unit) * unit, {0}};
    const int64_t useful = smaller(threads, blocks(elements, kElementsWorthAThread));
    parallel(take_pieces<Job>, &shared, static_cast<unsigned>(useful), 0);
}

std::atomic<int64_t> products{0};  // multiplied so far

#ifdef LOWBIT_X86
bool has_vnni() { return selected_isa >= kAvx512 && __builtin_cpu_supports("avx512vnni"); }

// Multiplies by a weight, or returns false where there are no kernels for it or the rows, or results are not of 16 bits.
// `input_type` is an index of UnitRowsKernels::arrange.
bool run_units(const UnitRowsKernels* kernels, UnitRowsJob job, int input_type, int64_t most_rows, int threads) {
    if (!kernels || job.rows <= 0 || job.rows > most_rows || job.columns <= 0 || job.element_type == 0) return false;
    const int64_t units = job.rows * job.depth / kUnit;
    static thread_local std::vector<char> memory;  // kept, as in lowbit_int8_linears
    static thread_local std::vector<float> floats;
    memory.resize(static_cast<size_t>(units * kernels->unit_bytes + 64));
    floats.resize(static_cast<size_t>(units * kernels->unit_floats));
    job.units = reinterpret_cast<void*>(blocks(reinterpret_cast<uintptr_t>(memory.data()), 64) * 64), job.unit_floats = floats.data();
    run(kernels->arrange[input_type], job, units, job.rows * job.depth, threads);
    run(kernels->multiply[job.rows - 1], job, blocks(job.columns, kUnitChannels), job.columns * job.depth / 4, threads);
    return true;
}
#endif

#ifdef LOWBIT_AMX
// Bring a job's input to tiles, for all products with it.
void arrange_amx(TileKernel arrange, TileJob& job, int threads) {
    const int64_t row_groups = blocks(job.rows, amx::kRowsTogether), depth = blocks(job.depth, 64) * 64;
    const int64_t scale_bytes = row_groups * amx::kRowsTogether * static_cast<int64_t>(sizeof(float));
    static thread_local std::vector<char> memory;  // kept, as in lowbit_int8_linears
    memory.resize(static_cast<size_t>(row_groups * amx::kRowsTogether * depth + scale_bytes + 64));
    job.tiles = reinterpret_cast<uint8_t*>(blocks(reinterpret_cast<uintptr_t>(memory.data()), 64) * 64);
    if (!job.row_scale) job.row_scale = reinterpret_cast<float*>(job.tiles + row_groups * amx::kRowsTogether * depth);
    run(arrange, job, row_groups, job.rows * job.depth, threads);
}

void multiply_amx(TileKernel multiply, TileJob job, int threads) {
    const int64_t group_columns = job.gated.data ? amx::kGroupColumns / 2 : amx::kGroupColumns;
    const int64_t row_groups = blocks(job.rows, amx::kRowsTogether), groups = blocks(job.columns, group_columns);
    job.row_block = blocks(row_groups, blocks(4 * threads, groups)) * amx::kRowsTogether;
    job.row_blocks = blocks(job.rows, job.row_block);
    job.call = ++products;
    constexpr int64_t kProductsPerElement = 256;  // multiply-adds in the time of one element of the other kernels
    const int64_t work = job.rows * job.columns * job.depth / kProductsPerElement;
    run(multiply, job, groups * job.row_blocks, work, threads, groups < 4 * threads ? 1 : job.row_blocks);
}

// Rows of int8 that are few enough not to rearrange the weights for.
bool are_few_int8(int64_t rows, bool are_gated) { return rows <= (are_gated ? 2 : 4) * amx::kTileRows; }

// Bring few rows of int8 to tiles, for all products with them.
void arrange_few_int8(TileJob& job, int threads) {
    static thread_local std::vector<char> memory;
    const int64_t steps = blocks(job.depth, 64);
    memory.resize(static_cast<size_t>(steps * blocks(job.rows, amx::kTileRows) * amx::kTileBytes + 64));
    job.tiles = reinterpret_cast<uint8_t*>(blocks(reinterpret_cast<uintptr_t>(memory.data()), 64) * 64);
    run(amx::transpose_rows, job, steps, job.rows * job.depth, threads);
}

void multiply_few_int8(const TileJob& job, int element_type, int threads) {
    const bool is_gated = job.gated.data, is_wide = job.rows <= 2 * amx::kTileRows && !is_gated;
    const int64_t groups = blocks(job.columns, (is_wide ? 2 : 1) * amx::kTileChannels);
    run(amx::few_int8_products[is_gated][element_type], job, groups, job.columns * job.depth / 8, threads);
}

// Few rows of bfloat16 with weights of int8 with a scale a channel. Returns whether it was done.
bool multiply_few_split(const WeightJob& weight, const void* x, int64_t rows, int64_t stride, const float* bias, void* output,
                        int threads) {
    const int64_t split_rows = amx::kBytesOfASplit * rows;
    if (weight.zero_point || !has_channel_scales(weight) || weight.depth > kMostExactInputs) return false;
    if (!are_few_int8(split_rows, false) || weight.columns % amx::kTileChannels) return false;
    static thread_local std::vector<int8_t> codes;
    static thread_local std::vector<float> scale;
    codes.resize(static_cast<size_t>(split_rows * weight.depth));
    scale.resize(static_cast<size_t>(rows));
    const SplitJob split{static_cast<const BFloat16*>(x), rows, weight.depth, stride, codes.data(), scale.data()};
    run(amx::split_rows, split, rows, rows * weight.depth, threads);
    TileJob job{codes.data(), split_rows, weight.depth, weight.depth, scale.data(), nullptr,
                {weight.weight, channel_scales(weight), bias}, {}, weight.columns, output, 0, 0, nullptr, 0};
    arrange_few_int8(job, threads);
    const int64_t channels = (split_rows <= 2 * amx::kTileRows ? 2 : 1) * amx::kTileChannels;
    run(amx::few_split_product, job, blocks(job.columns, channels), job.columns * job.depth / 8, threads);
    return true;
}

// Whether rows are multiplied with a weight's groups as integers, in tiles.
bool are_grouped_rows(const WeightJob& weight, const amx::RowRange& range, int64_t rows) {
    const int64_t inputs = smaller(weight.block_columns, weight.depth);
    const bool are_groups = weight.scale_type <= 1 && weight.block_rows == 1 && !weight.outer_scale && inputs % amx::kStep == 0;
    const bool are_whole = weight.depth % amx::kStep == 0 && weight.columns % amx::kTileChannels == 0;
    return are_groups && are_whole && rows >= range.least && rows <= range.most;
}

// Few rows of bfloat16 with weights of int8 or int4 in groups. Returns whether it was done.
bool multiply_few_grouped(const WeightJob& weight, bool is_int4, const void* x, int64_t rows, int64_t stride, const float* bias,
                          void* output, int threads) {
    if (!are_grouped_rows(weight, is_int4 ? amx::kRowsOfInt4 : amx::kRowsOfInt8, rows)) return false;
    const int64_t split_rows = amx::kBytesOfAUnit * rows, inputs = smaller(weight.block_columns, weight.depth);
    const int64_t unit = inputs % kUnit ? amx::kStep : kUnit, floats = blocks(weight.depth, unit) * kMostRows;
    static thread_local std::vector<int8_t> codes;
    static thread_local std::vector<float> scales;
    codes.resize(static_cast<size_t>(split_rows * weight.depth));
    scales.resize(static_cast<size_t>(2 * floats));
    const UnitJob units{static_cast<const BFloat16*>(x), rows, weight.depth, stride, unit, is_int4, weight.zero_point != nullptr,
                        is_int4 ? amx::kNibbleScale : 1.0f, codes.data(), scales.data(), scales.data() + floats};
    run(amx::round_units, units, rows, rows * weight.depth, threads);
    const GroupScales groups{weight.scale, weight.zero_point, blocks(weight.depth, inputs), inputs, unit / amx::kStep, units.scales, units.sums};
    TileJob job{codes.data(), split_rows, weight.depth, weight.depth, nullptr, nullptr,
                {weight.weight, nullptr, bias}, {}, weight.columns, output, 0, 0, nullptr, 0, {}, &groups};
    arrange_few_int8(job, threads);
    const auto& products = is_int4 ? amx::grouped_products<avx512::Int4> : amx::grouped_products<Int8>;
    run(products[weight.scale_type][weight.zero_point != nullptr], job, blocks(job.columns, amx::kPairChannels),
        job.columns * job.depth / 8, threads);
    return true;
}

void multiply_rows(TileJob job, int threads) {
    arrange_amx(amx::arrange_rows, job, threads);
    multiply_amx(amx::bfloat16_product, job, threads);
}
#endif

#ifdef LOWBIT_BFLOAT16
// What multiplies bfloat16 with the selected instruction set, or null.
const BFloat16Kernels* bfloat16_kernels() {
#ifdef LOWBIT_AMX
    if (selected_isa == kAmx) return &amx::bfloat16_kernels;
#endif
    return selected_isa == kAvx512BFloat16 ? &avx512_bf16::bfloat16_kernels : nullptr;
}

// The kernels for up to most_unit_rows() rows of bfloat16, or null.
const UnitRowsKernels* unit_rows_kernels(const WeightJob& weight, int code_type) {
    const UnitRowsKernels* words = selected_isa == kAvx512BFloat16 ? avx512_bf16::kernels_for(weight, code_type) : nullptr;
    return words ? words : avx512_vnni::kernels_for(weight, code_type);
}

// Of more rows decoding takes less time than multiplying integers, of which tiles make less.
int64_t most_unit_rows() { return selected_isa == kAmx ? 2 : kFewRows; }

// Finds the hidden rows of job.low_rank; of `job` only the rows and the depth are used besides.
void project_low_rank(const BFloat16Kernels& kernels, TileJob& job, int threads) {
    using avx512_bf16::kPieceInputs;
    LowRank& low_rank = job.low_rank;
    const int64_t pieces = blocks(job.depth / 2, kPieceInputs), width = avx512_bf16::padded_rank(low_rank);
    static thread_local std::vector<float> partial;
    static thread_local std::vector<BFloat16> hidden;
    partial.resize(static_cast<size_t>(pieces * job.rows * width));
    hidden.resize(static_cast<size_t>(job.rows * low_rank.rank));
    low_rank.partial = partial.data(), low_rank.hidden = hidden.data();
    run(kernels.project_rows, job, pieces, job.depth * low_rank.rank, threads);
    kernels.add_pieces(job, pieces);
}

// Fills the tiles of job.low_rank.
void arrange_low_rank(const BFloat16Kernels& kernels, const TileJob& job) {
    const LowRank& low_rank = job.low_rank;
    TileJob projected = job;
    projected.input = low_rank.hidden, projected.depth = projected.stride = 2 * low_rank.rank;
    projected.tiles = low_rank.tiles, projected.decoder = nullptr;
    kernels.transpose_rows(projected, 0, blocks(projected.depth, 64));
}

void multiply_few_rows(const BFloat16Kernels& kernels, TileJob job, int threads) {
    using namespace avx512_bf16;
    static thread_local std::vector<char> memory;
    const int64_t row_blocks = blocks(job.rows, kTileRows), steps = blocks(job.depth, 64);
    const int64_t low_rank_steps = blocks(2 * job.low_rank.rank, 64);
    memory.resize(static_cast<size_t>(row_blocks * (steps + low_rank_steps) * kTileBytes + 64));
    job.tiles = reinterpret_cast<uint8_t*>(blocks(reinterpret_cast<uintptr_t>(memory.data()), 64) * 64);
    run(kernels.transpose_rows, job, steps, job.rows * job.depth, threads);
    job.low_rank.tiles = job.tiles + row_blocks * steps * kTileBytes;
    if (job.low_rank.rank) project_low_rank(kernels, job, threads), arrange_low_rank(kernels, job);
    const int64_t groups = blocks(job.columns, kernels.channels_of_group(job.rows));
    run(job.decoder->multiply_few_rows, job, groups, job.columns * job.depth / 8, threads);
}

void multiply_vector_rows(TileJob job, int threads) {
    using namespace avx512_bf16;
    static thread_local std::vector<char> memory;  // kept, as in lowbit_int8_linears
    if (!are_arranged(job)) {
        memory.resize(static_cast<size_t>(job.rows * step_bytes_of(job) + 64));
        job.tiles = reinterpret_cast<uint8_t*>(blocks(reinterpret_cast<uintptr_t>(memory.data()), 64) * 64);
        run(arrange_rows, job, job.rows, job.rows * job.depth, threads);
    }
    const int64_t groups = blocks(job.columns, kVectorColumns), wanted = blocks(4 * threads, groups);
    job.row_block = smaller(blocks(blocks(job.rows, wanted), kVectorRows) * kVectorRows, kMostVectorRows);
    job.row_blocks = blocks(job.rows, job.row_block);
    job.call = ++products;
    constexpr int64_t kProductsPerElement = 32;  // multiply-adds in the time of one element of the other kernels
    const int64_t work = job.rows * job.columns * job.depth / 2 / kProductsPerElement;
    run(multiply_many_rows, job, groups * job.row_blocks, work, threads, groups < 4 * threads ? 1 : job.row_blocks);
}

// low_rank: only of few rows.
void run_bfloat16(const BFloat16Kernels& kernels, const void* x, int64_t rows, int64_t depth, int64_t stride, const void* weight,
                  const BFloat16Decoder& decoder, int64_t columns, const float* bias, void* output, int threads,
                  const LowRank& low_rank = {}) {
    constexpr int64_t kRowsAtOnce = 4096;  // that are held as they are multiplied; each piece reads the whole weight
    for (int64_t first = 0; first < rows && columns > 0; first += kRowsAtOnce) {
        const auto* part = static_cast<const BFloat16*>(x) + first * stride;
        auto* to = static_cast<BFloat16*>(output) + first * columns;
        const TileJob job{part, smaller(kRowsAtOnce, rows - first), 2 * depth, 2 * stride, nullptr, nullptr,
                          {weight, decoder.channel_scale, bias}, {nullptr, nullptr, nullptr}, columns, to, 0, 0, &decoder, 0, low_rank};
        if (job.rows <= avx512_bf16::kMostFewRows) multiply_few_rows(kernels, job, threads);
#ifdef LOWBIT_AMX
        else if (selected_isa == kAmx) multiply_rows(job, threads);
#endif
        else multiply_vector_rows(job, threads);
    }
}
#endif

}  // namespace

// Set the function that runs work in parallel (GOMP_parallel), or null for none.
LOWBIT_EXPORT void lowbit_set_parallel(void* function) { parallel = reinterpret_cast<Parallel>(function); }

// Select an instruction set (0 generic, 1 AVX2, 2 AVX-512, 3 AVX512-BF16, 4 AMX; negative: the best) and return the one in use.
LOWBIT_EXPORT int lowbit_select_isa(int isa) {
    const int best = best_isa();
    selected_isa = isa < 0 || isa > best ? best : isa;
    selected = kernels_of(selected_isa);
    selected_weight = weight_kernels_of(selected_isa);
    selected_elementwise = elementwise_kernels_of(selected_isa);
    return selected_isa;
}

LOWBIT_EXPORT int lowbit_selected_isa() { return selected_isa; }

// input [positions, heads, width], or several of those -> output likewise: each width divided by the root of its mean square
// plus epsilon, if is_normalized; times weight [width] where there is one; its pairs, as complex numbers, times frequencies
// [positions, width / 2, 2], where there are any. width at most 8192.
LOWBIT_EXPORT void lowbit_normalize(const void* input, int element_type, int64_t rows, int64_t width, int is_normalized,
                                    float epsilon, const float* weight, const float* frequencies, int64_t heads,
                                    int64_t positions, void* output, int threads) {
    const NormalizeJob job{input, width, is_normalized != 0, epsilon, weight, frequencies, heads, positions, output};
    run(selected_elementwise->normalize[element_type], job, rows, rows * width, threads);
}

// silu(gate) * value of `count` elements.
LOWBIT_EXPORT void lowbit_gate(const void* gate, const void* value, int element_type, int64_t count, void* output,
                               int threads) {
    const GateJob job{gate, value, count, output};
    run(selected_elementwise->gate[element_type], job, blocks(count, kElementsOfAPiece), count, threads);
}

// input [rows, columns] with rows `stride` elements apart -> output [rows, columns] dense,
// scale [ceil(rows / block_rows), ceil(columns / block_columns)].
LOWBIT_EXPORT void lowbit_quantize(const void* input, int element_type, int64_t rows, int64_t columns, int64_t stride,
                                   int64_t block_rows, int64_t block_columns, void* output, int code_type,
                                   float* scale, int threads) {
    constexpr int64_t kLarge = 4 << 20;  // allocators take such blocks from the system each time
    const bool is_large = rows * columns >= kLarge;
    const QuantizeJob job{input, rows, columns, stride, block_rows, block_columns, output, scale, is_large};
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
    return best_isa() >= kAvx512 && __builtin_cpu_supports("avx512vnni");
#else
    return 0;
#endif
}

// x uint8 [rows, depth] (int8 + 128) times weight int8 [columns, depth] -> output [rows, columns]: the exact integers, rounded to
// float32, times x_scale [rows] and weight_scale [columns], plus bias [columns] (or null), rounded to the output's type.
// columns % 16 == 0, depth % 4 == 0, depth <= kMostExactInputs.
LOWBIT_EXPORT void lowbit_int8_product(const uint8_t* x, int64_t rows, int64_t depth, const float* x_scale,
                                       const int8_t* weight, int64_t columns, const float* weight_scale,
                                       const float* bias, void* output, int element_type, int threads) {
#ifdef LOWBIT_X86
    if (rows <= 0 || columns <= 0) return;
#ifdef LOWBIT_AMX
    if (selected_isa == kAmx) {
        TileJob job{x, rows, depth, depth, const_cast<float*>(x_scale), nullptr, {weight, weight_scale, bias},
                   {nullptr, nullptr, nullptr}, columns, output, 0, 0, nullptr, 0};
        if (are_few_int8(rows, false)) {
            static thread_local std::vector<uint8_t> codes;
            codes.assign(x, x + rows * depth);
            for (uint8_t& code : codes) code ^= 128;
            job.input = codes.data();
            arrange_few_int8(job, threads);
            multiply_few_int8(job, element_type, threads);
            return;
        }
        arrange_amx(amx::arrange_rows, job, threads);
        multiply_amx(amx::int8_products[0][element_type], job, threads);
        return;
    }
#endif
    const int64_t groups = blocks(columns, avx512_vnni::kVectorColumns);
    // Blocks of rows small enough to give every thread several tasks, in whole tiles together with the row of ones.
    const int64_t wanted = blocks(4 * threads, groups);
    const int64_t tiles = blocks(blocks(rows, wanted) + 1, avx512_vnni::kVectorRows);
    const int64_t most = rows <= kMostRowsAlong ? rows : tiles * avx512_vnni::kVectorRows - 1;
    const int64_t block = smaller(most, kLargestRowBlock);
    const int64_t row_blocks = blocks(rows, block);
    const ProductJob job{x, x_scale, weight, weight_scale, bias, rows, columns, depth, block, row_blocks, output, ++products};
    constexpr int64_t kProductsPerElement = 64;  // multiply-adds in the time of one element of the other kernels
    const int64_t work = columns * depth / 4 + rows * columns * depth / kProductsPerElement;
    // All rows of a group of panels are one thread's where there are groups enough: then it alone packs them.
    const int64_t unit = groups < 4 * threads ? 1 : row_blocks;
    run(avx512_vnni::multiplications[element_type], job, groups * row_blocks, work, threads, unit);
#endif
}

// x [rows, depth], rows `stride` elements apart, quantized as lowbit_quantize does with a scale a row, and multiplied as by
// lowbit_int8_product with `count` weights -> their outputs [rows, columns], of the type of x. Of two weights that are_gated,
// which need lowbit_has_amx_products, one output: silu of the first result times the second, rounded once.
LOWBIT_EXPORT void lowbit_int8_linears(const void* x, int element_type, int64_t rows, int64_t depth, int64_t stride, int64_t count,
                                       const int8_t* const* weights, const int64_t* columns, const float* const* weight_scales,
                                       const float* const* biases, void* const* outputs, int are_gated, int threads) {
#ifdef LOWBIT_X86
    constexpr int64_t kRowsAtOnce = 1152;  // whose codes are held; each piece reads the whole weights
    const int64_t element_bytes = element_type == 0 ? 4 : 2;
    for (int64_t first = 0; first < rows; first += kRowsAtOnce) {
        const int64_t part_rows = smaller(kRowsAtOnce, rows - first);
        const void* part = static_cast<const char*>(x) + first * stride * element_bytes;
        const auto output = [&](int64_t i) { return static_cast<char*>(outputs[i]) + first * columns[i] * element_bytes; };
        static thread_local std::vector<uint8_t> codes;  // kept: fresh pages take as long as filling them
        static thread_local std::vector<float> scale;
        const auto quantize = [&](int code_type) {
            codes.resize(static_cast<size_t>(part_rows * depth));
            scale.resize(static_cast<size_t>(part_rows));
            const QuantizeJob job{part, part_rows, depth, stride, 1, depth, codes.data(), scale.data(), false};
            run(selected->quantize[element_type][code_type], job, part_rows, part_rows * depth, threads);
        };
#ifdef LOWBIT_AMX
        if (selected_isa == kAmx) {
            const bool are_few = are_few_int8(part_rows, are_gated);
            TileJob job{part, part_rows, depth, stride, nullptr, nullptr, {}, {}, 0, nullptr, 0, 0, nullptr, 0};
            if (are_few) {
                quantize(0);
                job.input = codes.data(), job.stride = depth, job.row_scale = scale.data();
                arrange_few_int8(job, threads);
            } else {
                arrange_amx(amx::quantizing_arrangements[element_type], job, threads);
            }
            for (int64_t i = 0; i < (are_gated ? 1 : count); ++i) {
                job.weight = {weights[i], weight_scales[i], biases[i]};
                if (are_gated) job.gated = {weights[1], weight_scales[1], biases[1]};
                job.columns = columns[i], job.output = output(i);
                if (job.columns <= 0) continue;
                if (are_few) multiply_few_int8(job, element_type, threads);
                else multiply_amx(amx::int8_products[are_gated][element_type], job, threads);
            }
            continue;
        }
#endif
        quantize(1);
        for (int64_t i = 0; i < count; ++i)
            lowbit_int8_product(codes.data(), part_rows, depth, scale.data(), weights[i], columns[i], weight_scales[i], biases[i],
                                output(i), element_type, threads);
    }
#endif
}

// Whether what multiplies bfloat16 by AMX runs with the selected instruction set.
LOWBIT_EXPORT int lowbit_has_amx_products() { return selected_isa == kAmx; }

// Whether rows of bfloat16 are multiplied by decoded weights with the selected instruction set.
LOWBIT_EXPORT int lowbit_multiplies_bfloat16() { return selected_isa >= kAvx512BFloat16; }

// Attention: see AttentionJob. sizes: batch, queries, keys, heads, key_heads, width (at most 256); strides: three each of
// query, key and value; kind: 0 float32, 1 int8, 2 e4m3, 3 int16, 4 bfloat16. The last
// needs lowbit_has_amx_products, the others what lowbit_int8_product needs.
LOWBIT_EXPORT void lowbit_attention(const void* query, const void* key, const void* value, const uint8_t* keep,
                                    void* output, int element_type, const int64_t* sizes, const int64_t* strides,
                                    float scale, int causal, int kind, int threads) {
#ifdef LOWBIT_X86
    AttentionJob job{query, key, value, strides, strides + 3, strides + 6, keep, output, sizes[0], sizes[1], sizes[2],
                     sizes[3], sizes[4], sizes[5], scale, causal != 0, 0, 0, nullptr, 0};
    const AttentionKernels* found = kind < kAttentionKinds ? &avx512_vnni::attentions[kind] : nullptr;
#ifdef LOWBIT_AMX
    if (kind == kAttentionKinds) found = &amx::amx_attention;
#endif
    const AttentionKernels& kernels = *found;
    job.head_bytes = kernels.head_bytes(job);
    // Several heads at a time, so that threads seldom wait for each other; few enough that what is prepared of their keys
    // and values is found in the cache.
    constexpr int64_t kBytesAtOnce = int64_t{16} << 20;
    const int64_t units = job.batch * job.key_heads, fitting = kBytesAtOnce / job.head_bytes;
    const int64_t group = smaller(units, fitting > threads ? fitting : threads < 1 ? 1 : threads);
    static thread_local std::vector<char> memory;  // kept: fresh pages cost as much as the work on short sequences
    memory.resize(static_cast<size_t>(group * job.head_bytes + 64));
    const auto address = reinterpret_cast<uintptr_t>(memory.data());
    job.workspace = memory.data() + (64 - address % 64) % 64;
    const int64_t row_blocks = blocks(job.queries, kernels.rows) * (job.heads / job.key_heads);
    for (; job.first_unit < units; job.first_unit += group) {
        const int64_t count = smaller(group, units - job.first_unit);
        job.units = count;
        const int64_t prepared = kernels.prepared_keys ? blocks(job.keys, kernels.prepared_keys) : count;
        run(kernels.prepare[element_type], job, prepared, count * job.keys * job.width * 8, threads);
        run(kernels.attend[element_type], job, count * row_blocks, count * job.queries * job.keys * job.width / 16, threads);
    }
#endif
}

// x [rows, depth] float32 (see WeightJob) times weight [columns, depth] of code_type (0 int8, 1 e4m3, 2 int4, 3 e2m1; of
// the last two two inputs in a byte, the even one in the lower half) -> output [rows, columns], rounded once. rows <= 64.
// Scales, and of int4 zero points, are one per block of block_rows x block_columns; of int4 block_rows is 1, block_columns
// a multiple of 32 that divides depth, and of each 32 activations the even ones come first, then the odd ones; of e2m1
// block_rows is 1, depth and block_columns are even.
LOWBIT_EXPORT void lowbit_weight_only(const float* x, int64_t rows, int64_t x_stride, int64_t depth, const void* weight,
                                      int code_type, int64_t columns, const void* scale, int scale_type,
                                      const void* zero_point, int64_t block_rows, int64_t block_columns,
                                      const float* outer_scale, int64_t outer_columns, const float* bias, void* output,
                                      int element_type, int threads) {
    constexpr int kInt4 = 2, kE2M1 = 3;
    WeightJob job{x,           rows,          x_stride, depth,  weight,       columns,           scale,
                  scale_type,  zero_point,    block_rows, block_columns, outer_scale, outer_columns, bias,
                  output,      element_type,  code_type == kInt4};
#ifdef LOWBIT_X86
    const auto* kernels = has_vnni() ? avx512_vnni::kernels_for(job, code_type) : nullptr;
    const UnitRowsJob few{&job, x, rows, x_stride, depth, columns, nullptr, nullptr, bias, output, element_type};
    if (run_units(kernels, few, job.is_split ? 0 : 1, kFewRows, threads)) return;
#endif
    if (code_type == kE2M1) selected_weight->split(job);
    const int64_t tasks = blocks(columns, selected_weight->task_channels);
    run(selected_weight->multiply[code_type], job, tasks, columns * depth / 4 * (4 + rows) / 4, threads);
}

// As above, of rows x [rows, depth] bfloat16, x_stride apart, in their own order (lowbit_multiplies_bfloat16); weights are
// rounded to bfloat16, the output is bfloat16. int8 has zero points, too, if depth and block_columns are multiples of 32. Of
// up to 64 rows and an even depth low_x [rows, depth], low_x_stride apart, times down [depth, rank], rounded, times the
// transpose of up [columns, rank], all bfloat16, is added to what is rounded, if rank is not 0; of codes of 4 bits alone, as
// scales of others may be left to the sums.
LOWBIT_EXPORT void lowbit_weight_only_bfloat16(const void* x, int64_t rows, int64_t x_stride, int64_t depth, const void* weight,
                                               int code_type, int64_t columns, const void* scale, int scale_type,
                                               const void* zero_point, int64_t block_rows, int64_t block_columns,
                                               const float* outer_scale, int64_t outer_columns, const float* bias,
                                               void* output, const void* low_x, int64_t low_x_stride, const void* down,
                                               const void* up, int64_t rank, int threads) {
#ifdef LOWBIT_BFLOAT16
    const BFloat16Kernels& products = *bfloat16_kernels();
    const WeightJob job{nullptr,    0,          0,             depth,       weight,        columns, scale,   scale_type,
                        zero_point, block_rows, block_columns, outer_scale, outer_columns, nullptr, nullptr, 1, false};
    const LowRank low_rank{static_cast<const BFloat16*>(low_x), low_x_stride, static_cast<const BFloat16*>(down),
                           static_cast<const BFloat16*>(up), rank, nullptr, nullptr, nullptr};
#ifdef LOWBIT_AMX
    constexpr int kInt8 = 0, kInt4 = 2;
    if (selected_isa == kAmx && !rank && (code_type == kInt8 || code_type == kInt4)) {
        if (code_type == kInt8 && multiply_few_split(job, x, rows, x_stride, bias, output, threads)) return;
        if (multiply_few_grouped(job, code_type == kInt4, x, rows, x_stride, bias, output, threads)) return;
    }
#endif
    const UnitRowsKernels* kernels = unit_rows_kernels(job, code_type);
    TileJob projected{};
    projected.rows = rows, projected.depth = 2 * depth, projected.low_rank = low_rank;
    if (kernels && rank && rows <= most_unit_rows()) project_low_rank(products, projected, threads);
    const UnitRowsJob few{&job, x, rows, x_stride, depth, columns, nullptr, nullptr, bias, output, 1, projected.low_rank};
    if (run_units(kernels, few, 2, most_unit_rows(), threads)) return;
    run_bfloat16(products, x, rows, depth, x_stride, &job, products.weight_decoders[code_type](job), columns, bias, output, threads,
                 low_rank);
#endif
}

// int4 [columns, depth] -> float32 [columns, depth], of each 32 inputs the even ones first, then the odd ones.
LOWBIT_EXPORT void lowbit_int4_decode(const void* weight, int64_t columns, int64_t depth, const void* scale,
                                      int scale_type, const uint8_t* zero_point, int64_t group_size, float* output,
                                      int threads) {
    const WeightJob job{nullptr,    0, 0,          depth,   weight, columns, scale,  scale_type,
                        zero_point, 1, group_size, nullptr, 0,      nullptr, output, 0, true};
    run(selected_weight->decode_int4, job, columns, columns * depth, threads);
}

// Blocks of a GGUF type [rows, bytes per row] -> output [rows, columns]. Returns 0, or 1 for a type it does not know or
// rows that are not whole blocks.
LOWBIT_EXPORT int lowbit_gguf_decode(const uint8_t* input, int type, int64_t rows, int64_t columns,
                                     int64_t row_bytes, void* output, int element_type, int threads) {
    const GgufKernels* kernels = gguf_kernels_of(selected_isa, type);
    if (kernels == nullptr || !is_row(*kernels, columns, row_bytes)) return 1;
    const GgufJob job{input, columns, output};
    run(kernels->decode[element_type], job, rows, rows * columns, threads);
    return 0;
}

// Whether lowbit_gguf_product runs with the selected instruction set.
LOWBIT_EXPORT int lowbit_has_gguf_product() { return gguf_kernels_of(selected_isa, 0)->multiply[0] != nullptr; }

// x float32 [rows, columns] times the transpose of blocks [features, bytes per row], plus bias [features] (or null) ->
// output [rows, features], summed in float32. columns is a multiple of 32. Returns as lowbit_gguf_decode.
LOWBIT_EXPORT int lowbit_gguf_product(const float* x, int64_t rows, int64_t columns, const uint8_t* input, int type,
                                      int64_t features, int64_t row_bytes, const float* bias, void* output, int element_type,
                                      int threads) {
    const GgufKernels* kernels = gguf_kernels_of(selected_isa, type);
    if (kernels == nullptr || !is_row(*kernels, columns, row_bytes) || columns % 32 || !kernels->multiply[0]) return 1;
#ifdef LOWBIT_X86
    const GgufRows weight{kernels, input, row_bytes};
    const auto* integer_kernels = has_vnni() ? avx512_vnni::kernels_for(weight, columns) : nullptr;
    const UnitRowsJob few{&weight, x, rows, columns, columns, features, nullptr, nullptr, bias, output, element_type};
    if (run_units(integer_kernels, few, 1, kFewRows, threads)) return 0;
#endif
    const GgufProductJob job{x, rows, columns, features, input, bias, output};
    run(kernels->multiply[element_type], job, blocks(features, 4), features * columns, threads);
    return 0;
}

// As above, of rows x bfloat16, which need lowbit_multiplies_bfloat16; weights are rounded to bfloat16, the output is bfloat16.
LOWBIT_EXPORT int lowbit_gguf_product_bfloat16(const void* x, int64_t rows, int64_t columns, const uint8_t* input, int type,
                                               int64_t features, int64_t row_bytes, const float* bias, void* output,
                                               int threads) {
    const GgufKernels* kernels = gguf_kernels_of(selected_isa, type);
    if (kernels == nullptr || !is_row(*kernels, columns, row_bytes)) return 1;
#ifdef LOWBIT_BFLOAT16
    const BFloat16Kernels& products = *bfloat16_kernels();
    const GgufRows weight{kernels, input, row_bytes};
    const UnitRowsJob few{&weight, x, rows, columns, columns, features, nullptr, nullptr, bias, output, 1};
    if (run_units(avx512_vnni::kernels_for(weight, columns), few, 2, most_unit_rows(), threads)) return 0;
    run_bfloat16(products, x, rows, columns, columns, &weight, products.gguf_decoder(weight), features, bias, output, threads);
#endif
    return 0;
}
