// What every unit knows: platform, element types, type codes of the ABI, and the arguments of kernels.
#ifndef LOWBIT_NATIVE_COMMON_H
#define LOWBIT_NATIVE_COMMON_H

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#if (defined(__x86_64__) || defined(_M_X64)) && (defined(__GNUC__) || defined(__clang__))
#define LOWBIT_HAVE_X86 1
#include <immintrin.h>
#elif defined(__aarch64__) && (defined(__GNUC__) || defined(__clang__))
#define LOWBIT_NEON 1
#include <arm_neon.h>
#endif

#if defined(LOWBIT_EMULATE)  // for the time it takes to build
#define LOWBIT_INLINE [[maybe_unused]] static
#define LOWBIT_INLINE_LAMBDA
#define LOWBIT_NOINLINE __attribute__((noinline))
#elif defined(__GNUC__) || defined(__clang__)
#define LOWBIT_INLINE static inline __attribute__((always_inline))
#define LOWBIT_INLINE_LAMBDA __attribute__((always_inline))
#define LOWBIT_NOINLINE __attribute__((noinline))
#else
#define LOWBIT_INLINE static inline
#define LOWBIT_INLINE_LAMBDA
#define LOWBIT_NOINLINE
#endif

#if defined(__linux__)
#include <sys/mman.h>
#endif

// What the compiler can build, beyond AVX-512 with VNNI.
#if defined(LOWBIT_HAVE_X86) && (defined(__clang__) ? __clang_major__ >= 9 : __GNUC__ >= 10)
#define LOWBIT_HAVE_BF16 1
#endif
// Linux gives a process the registers of AMX at its request.
#if defined(LOWBIT_HAVE_BF16) && defined(__linux__) && (defined(__clang__) ? __clang_major__ >= 12 : __GNUC__ >= 11)
#define LOWBIT_HAVE_AMX 1
#endif

// Intrinsics of AVX-512 and AMX as portable code, for tests on CPUs without them.
#ifdef LOWBIT_EMULATE
#include "emulation/simd512.h"
#include "emulation/tiles.h"
#endif

namespace lowbit {

// Each has what those before it have.
enum Isa : int { kGeneric = 0, kAvx2 = 1, kAvx512 = 2, kAvx512BFloat16 = 3, kAmx = 4 };

// Type codes of the ABI; lowbit/ops/cpu/native.py has the same tables.
enum ElementType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kElementTypes = 3 };
enum CodeType : int { kCodeInt8 = 0, kCodeUint8 = 1, kCodeE4M3 = 2, kCodeTypes = 3 };
enum WeightType : int { kWeightInt8 = 0, kWeightE4M3 = 1, kWeightInt4 = 2, kWeightE2M1 = 3, kWeightTypes = 4 };
enum ScaleType : int { kScaleFloat32 = 0, kScaleBFloat16 = 1, kScaleE8M0 = 2, kScaleE4M3 = 3 };
enum AttentionKind : int {
    kAttentionFloat32 = 0,
    kAttentionInt8 = 1,
    kAttentionE4M3 = 2,
    kAttentionInt16 = 3,
    kAttentionBFloat16 = 4,  // by AMX
};

struct BFloat16 {
    uint16_t bits;
};
struct Half {
    uint16_t bits;
};
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
    void* output;        // [rows, columns]
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

constexpr int64_t kPanelChannels = 16;
constexpr int64_t kLargestRowBlock = 1151;  // with the row of ones in whole tiles; a thread's sums take 288 KiB

constexpr int64_t kMostExactInputs = int64_t{1} << 17;  // of which no sum of products of int8 leaves int32
constexpr int64_t kMostRowsAlong = 12;  // of int8 that are multiplied along the inputs; of more, packing costs less than it saves
constexpr int64_t kFewRows = 4;         // of floating point

struct ProductJob {
    const uint8_t* x;                  // [rows, depth], int8 + 128
    const float* x_scale;              // [rows]
    const int8_t* weight;              // [columns, depth]
    const float *weight_scale, *bias;  // [columns]
    int64_t rows, columns, depth, row_block, row_blocks;
    void* output;  // [rows, columns]
    int64_t call;  // a number of its own
};

struct TileWeight {
    const void* data;                  // [columns, depth]; or what `decode` takes
    const float *column_scale, *bias;  // [columns]; either may be null, the scale of int8 is there
};

struct GemmArgs;
using TileKernel = void (*)(const GemmArgs&, int64_t, int64_t);

// How a weight is brought to bfloat16.
struct BFloat16Decoder {
    // Writes inputs [first, first + count) of a channel; first is a multiple of 256, count at most 2048.
    void (*decode)(const void* weight, int64_t channel, int64_t first, int64_t count, BFloat16* output);
    TileKernel multiply_few_rows;  // the same within a product
    const uint16_t* order;         // input order[i] of each 32 is written as the i-th, or null: as they lie
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
    uint8_t* tiles;    // the same as GemmArgs's tiles
};

constexpr int64_t kKTile = 128;        // inputs with one scale of the activations
constexpr int64_t kUnitChannels = 16;  // of a task

// Up to kFewRows rows times a weight that is multiplied as it is read (kernels/unit_rows.h).
struct UnitRowsJob {
    const void* weight;  // what the kernels' weight is made of
    const void* x;       // [rows, depth], x_stride elements apart
    int64_t rows, x_stride, depth, columns;
    void* units;         // [rows, depth / kKTile] of what `arrange` makes of the activations
    float* unit_floats;  // likewise, some for each; apart, so that units leave more of the first-level cache
    const float* bias;   // [columns], or null
    void* output;        // [rows, columns]
    int element_type;
    LowRank low_rank;  // its hidden [rows, rank] and up are used
};

using UnitRowsKernel = void (*)(const UnitRowsJob&, int64_t, int64_t);

// Scales, and zero points, of groups of a weight's inputs, and of UnitJob's units.
struct GroupScales {
    const void *scales, *zero_points;         // [channels][groups]; the second may be null
    int64_t per_channel, inputs, unit_steps;  // groups of a channel, inputs of a group, 64 of them of a unit
    const float *row_scales, *row_sums;       // UnitJob's
};

struct GemmArgs {
    const void* input;            // [rows, depth]
    int64_t rows, depth, stride;  // depth in bytes of what is multiplied; rows are `stride` apart, in bytes or, where they
                                  // are quantized first, in elements
    float* row_scale;             // [rows], of int8; null where it is found by quantizing
    uint8_t* tiles;               // what is multiplied, as the instruction reads it: whole tiles of 32 rows and 64 bytes
    TileWeight weight, gated;     // the second null, or multiplied with silu of the first one's result
    int64_t columns;
    void* output;  // [rows, columns]
    int64_t row_block, row_blocks;
    const BFloat16Decoder* decoder;  // null for weights that are multiplied as they are
    int64_t call;                    // a number of its own
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
    const BFloat16* x;                    // [rows, depth], rows `stride` apart
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
    const void* scale;       // one per block of the weight
    int scale_type;          // a ScaleType
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

struct GgufJob {
    const uint8_t* input;  // [rows, bytes per row]
    int64_t columns;
    void* output;  // [rows, columns]
    int element_type;
};

struct GgufProductJob {
    const float* x;  // [rows, columns]
    int64_t rows, columns, features;
    const uint8_t* input;  // [features, bytes per row]
    const float* bias;     // [features] or null
    void* output;          // [rows, features]
    int element_type;
};

struct GgufKernels;

struct GgufRows {
    const GgufKernels* kernels;
    const uint8_t* input;
    int64_t row_bytes;
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
inline bool has_channel_scales(const WeightJob& job) {
    return job.scale_type == 0 && job.block_columns >= job.depth && !job.outer_scale;
}

#ifdef LOWBIT_HAVE_X86
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

}  // namespace lowbit

#endif  // LOWBIT_NATIVE_COMMON_H
