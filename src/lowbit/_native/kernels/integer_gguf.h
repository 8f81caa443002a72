// Blocks of GGUF files as weights of integer_rows.h: their codes as they are, never decoded to numbers. The layouts are those of
// gguf_blocks.h.
#ifndef LOWBIT_NATIVE_KERNELS_INTEGER_GGUF_H
#define LOWBIT_NATIVE_KERNELS_INTEGER_GGUF_H

#include "gguf_blocks.h"
#include "integer_rows.h"

LOWBIT_BEGIN(vnni)

// A channel. What the types with blocks of 32 inputs, and then those of 256, have in common is below.
template <typename Block>
struct BlockWeight {
    using Units = IntegerUnits;
    static constexpr int unit_bytes = kKTile * Block::bytes / Block::elements;
    const GgufRows& rows;
    const uint8_t* channel_blocks;

    explicit BlockWeight(const void* weight) : rows(*static_cast<const GgufRows*>(weight)) {}

    LOWBIT_INLINE_LAMBDA inline float begin(int64_t channel) {
        channel_blocks = rows.input + channel * rows.row_bytes;
        return 1.0f;
    }

    LOWBIT_INLINE_LAMBDA inline const uint8_t* at(int64_t i) const { return channel_blocks + i * unit_bytes; }
};

// 16 bytes of each of four blocks.
template <typename Block>
LOWBIT_INLINE __m512i load_four(const uint8_t* from) {
    const auto bytes = [=](int i) LOWBIT_INLINE_LAMBDA {
        return _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i * Block::bytes));
    };
    __m512i all = _mm512_castsi128_si512(bytes(0));
    all = _mm512_inserti32x4(all, bytes(1), 1);
    all = _mm512_inserti32x4(all, bytes(2), 2);
    return _mm512_inserti32x4(all, bytes(3), 3);
}

// Two bytes of each of four blocks, 16 bits one after the other.
template <typename Block>
LOWBIT_INLINE uint64_t four_words(const uint8_t* from) {
    uint16_t words[4];
    for (int i = 0; i < 4; ++i) std::memcpy(words + i, from + i * Block::bytes, 2);
    uint64_t all;
    std::memcpy(&all, words, sizeof all);
    return all;
}

// A float16 of each of four blocks, in four lanes each.
template <typename Block>
LOWBIT_INLINE __m512 four_halves(const uint8_t* from) {
    const __m256i spread = _mm256_set_epi64x(0x0706070607060706, 0x0504050405040504, 0x0302030203020302, 0x0100010001000100);
    const __m256i words = _mm256_set1_epi64x(static_cast<int64_t>(four_words<Block>(from)));
    return _mm512_cvtph_ps(_mm256_shuffle_epi8(words, spread));
}

// Codes of four bits as they number the values of IQ4_NL.
LOWBIT_INLINE void look_up_iq4(UnitCodes& unit) {
    const __m512i values =
        _mm512_broadcast_i32x4(_mm_setr_epi8(-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113));
    for (__m512i& codes : unit.codes) codes = _mm512_shuffle_epi8(values, codes);
}

struct WeightQ8_0 : BlockWeight<base::BlockQ8_0> {
    static constexpr bool is_signed = true, is_joint = true;
    static constexpr int run = 16;
    using BlockWeight::BlockWeight;

    LOWBIT_INLINE_LAMBDA inline UnitCodes load(int64_t i) const {
        UnitCodes unit;
        unit.codes[0] = load_four<base::BlockQ8_0>(at(i) + 2);
        unit.codes[1] = load_four<base::BlockQ8_0>(at(i) + 18);
        unit.scale[0] = four_halves<base::BlockQ8_0>(at(i));
        return unit;
    }

    LOWBIT_INLINE_LAMBDA static inline __m512 product(const UnitCodes& weight, const Unit& unit) {
        return joint_product<true, true, false>(weight, unit);
    }
};

struct WeightIQ4_NL : BlockWeight<base::BlockIQ4_NL> {
    static constexpr bool is_signed = true, is_joint = true;
    static constexpr int run = 16;
    using BlockWeight::BlockWeight;

    LOWBIT_INLINE_LAMBDA inline UnitCodes load(int64_t i) const {
        UnitCodes unit;
        split_nibbles(load_four<base::BlockIQ4_NL>(at(i) + 2), unit);
        look_up_iq4(unit);
        unit.scale[0] = four_halves<base::BlockIQ4_NL>(at(i));
        return unit;
    }

    LOWBIT_INLINE_LAMBDA static inline __m512 product(const UnitCodes& weight, const Unit& unit) {
        return joint_product<true, true, false>(weight, unit);
    }
};

// Q4_0, Q4_1, Q5_0, Q5_1: a float16 scale, a minimum in the types _1, four bytes of fifth bits in those of five, and codes of four
// bits, inputs i and i + 16 in a byte. Without a minimum codes are less half their range.
template <typename Block, bool kHasMinimum, bool kHasFifth>
struct WeightOf32 : BlockWeight<Block> {
    static constexpr bool is_signed = false, is_joint = true;
    static constexpr int run = 16;
    using BlockWeight<Block>::BlockWeight;

    LOWBIT_INLINE_LAMBDA inline UnitCodes load(int64_t i) const {
        constexpr int kFifth = kHasMinimum ? 4 : 2;
        const uint8_t* from = this->at(i);
        UnitCodes unit;
        split_nibbles(load_four<Block>(from + kFifth + (kHasFifth ? 4 : 0)), unit);
        for (int r = 0; kHasFifth && r < 2; ++r) {
            const __mmask64 is_set = four_words<Block>(from + kFifth + 2 * r);
            unit.codes[r] = _mm512_mask_add_epi8(unit.codes[r], is_set, unit.codes[r], _mm512_set1_epi8(16));
        }
        unit.scale[0] = four_halves<Block>(from);
        if (kHasMinimum) unit.minimum[0] = _mm512_sub_ps(_mm512_setzero_ps(), four_halves<Block>(from + 2));
        else unit.minimum[0] = _mm512_mul_ps(unit.scale[0], _mm512_set1_ps(kHasFifth ? 16.0f : 8.0f));
        return unit;
    }

    LOWBIT_INLINE_LAMBDA static inline __m512 product(const UnitCodes& weight, const Unit& unit) {
        return joint_product<false, true, true>(weight, unit);
    }
};

// Of types with blocks of 256 inputs, which are two units: the scales and minimums of a block, found with its first unit.
template <typename Block>
struct LargeBlockWeight : BlockWeight<Block> {
    alignas(64) float scales[16], minimums[16];
    const uint8_t* block;
    using BlockWeight<Block>::BlockWeight;

    // Returns which half of its block a unit is.
    template <typename FindScales>
    LOWBIT_INLINE_LAMBDA inline int begin_unit(int64_t i, FindScales find_scales) {
        if (i % 2 == 0) block = this->channel_blocks + i / 2 * Block::bytes, find_scales();
        return static_cast<int>(i % 2);
    }

    // `groups`: of the lanes of register r.
    LOWBIT_INLINE_LAMBDA inline void spread(int r, __m512i groups, UnitCodes& unit) const {
        unit.scale[r] = _mm512_permutexvar_ps(groups, _mm512_load_ps(scales));
        unit.minimum[r] = _mm512_permutexvar_ps(groups, _mm512_load_ps(minimums));
    }

    LOWBIT_INLINE_LAMBDA static inline __m512 product(const UnitCodes& weight, const Unit& unit) {
        return apart_product(weight, unit);
    }
};

// first, first + 1, ... of `lanes` lanes each, `step` apart.
template <int kLanes>
LOWBIT_INLINE __m512i groups_from(int first, int step = 1) {
    const __m512i number = _mm512_srli_epi32(lane_numbers(), kLanes == 8 ? 3 : 2);
    return _mm512_add_epi32(_mm512_mullo_epi32(number, _mm512_set1_epi32(step)), _mm512_set1_epi32(first));
}

// 32 bytes twice, turned right by so many bits.
LOWBIT_INLINE __m512i turn_both(const uint8_t* from, int first, int second) {
    const __m512i bytes = _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
    return _mm512_rorv_epi32(bytes, _mm512_inserti64x4(_mm512_set1_epi32(first), _mm256_set1_epi32(second), 1));
}

// `codes` with what of `bits` is under a mask of a byte.
LOWBIT_INLINE __m512i add_bits(__m512i codes, __m512i bits, char mask) {
    return _mm512_ternarylogic_epi32(codes, bits, _mm512_set1_epi8(mask), 0xf8);
}

// Q4_K and Q5_K: of each 32 bytes the lower halves are a group, the upper ones the next.
template <typename Block, bool kHasFifth>
struct WeightQ45_K : LargeBlockWeight<Block> {
    static constexpr bool is_signed = false, is_joint = false;
    static constexpr int run = 32;
    using LargeBlockWeight<Block>::LargeBlockWeight;

    LOWBIT_INLINE_LAMBDA inline UnitCodes load(int64_t i) {
        const int half = this->begin_unit(i, [this]() LOWBIT_INLINE_LAMBDA {
            base::scales_and_minimums(this->block, this->scales);
            const __m512 all = _mm512_load_ps(this->scales);
            _mm512_store_ps(this->minimums, _mm512_shuffle_f32x4(all, all, 0xee));
        });
        UnitCodes unit;
        split_nibbles(_mm512_loadu_si512(this->block + (kHasFifth ? 48 : 16) + 64 * half), unit);
#pragma GCC unroll 2
        for (int r = 0; r < 2; ++r) {
            const int group = 4 * half + r;  // and group + 2
            this->spread(r, groups_from<8>(group, 2), unit);
            if (kHasFifth) unit.codes[r] = add_bits(unit.codes[r], turn_both(this->block + 16, group - 4, group - 2), 16);
        }
        return unit;
    }
};

// Q6_K, Q2_K and Q3_K, which have sixteen groups: `Weight` finds their scales and what is to be subtracted, and loads the codes
// of a register.
template <typename Weight, typename Block>
struct SixteenGroups : LargeBlockWeight<Block> {
    static constexpr bool is_signed = false, is_joint = false;
    static constexpr int run = 64;
    using LargeBlockWeight<Block>::LargeBlockWeight;

    LOWBIT_INLINE_LAMBDA inline UnitCodes load(int64_t i) {
        auto& weight = static_cast<Weight&>(*this);
        const int half = this->begin_unit(i, [&weight]() LOWBIT_INLINE_LAMBDA { weight.find_scales(); });
        UnitCodes unit;
#pragma GCC unroll 2
        for (int r = 0; r < 2; ++r) {
            unit.codes[r] = weight.load_register(half, r);
            this->spread(r, groups_from<4>(8 * half + 4 * r), unit);
        }
        return unit;
    }

    // For codes that are less `offset`.
    LOWBIT_INLINE_LAMBDA inline void offset_codes(float offset) {
        _mm512_store_ps(this->minimums, _mm512_mul_ps(_mm512_load_ps(this->scales), _mm512_set1_ps(offset)));
    }
};

// Of 32 bytes two bits each: pairs 2 r and 2 r + 1.
LOWBIT_INLINE __m512i two_bits(const uint8_t* from, int r) {
    return _mm512_and_si512(turn_both(from, 4 * r, 4 * r + 2), _mm512_set1_epi8(3));
}

struct WeightQ6_K : SixteenGroups<WeightQ6_K, base::BlockQ6_K> {
    using SixteenGroups::SixteenGroups;

    LOWBIT_INLINE_LAMBDA inline void find_scales() {
        base::scales_of_q6_k(block, scales);
        offset_codes(32.0f);
    }

    LOWBIT_INLINE_LAMBDA inline __m512i load_register(int half, int r) const {
        const __m512i low = _mm512_loadu_si512(block + 64 * half);
        const __m512i codes = low_nibbles(r == 0 ? low : _mm512_srli_epi16(low, 4));
        return add_bits(codes, turn_both(block + 128 + 32 * half, 4 * r - 4, 4 * r - 2), 48);
    }
};

struct WeightQ2_K : SixteenGroups<WeightQ2_K, base::BlockQ2_K> {
    using SixteenGroups::SixteenGroups;

    LOWBIT_INLINE_LAMBDA inline void find_scales() { base::scales_and_minimums_of_q2_k(block, scales, minimums); }

    LOWBIT_INLINE_LAMBDA inline __m512i load_register(int half, int r) const { return two_bits(block + 16 + 32 * half, r); }
};

struct WeightQ3_K : SixteenGroups<WeightQ3_K, base::BlockQ3_K> {
    using SixteenGroups::SixteenGroups;

    LOWBIT_INLINE_LAMBDA inline void find_scales() {
        base::scales_of_q3_k(block, scales);
        offset_codes(4.0f);
    }

    LOWBIT_INLINE_LAMBDA inline __m512i load_register(int half, int r) const {
        const int third = 4 * half + 2 * r;  // the bit of the first 32 inputs in each byte
        return add_bits(two_bits(block + 32 + 32 * half, r), turn_both(block, third - 2, third - 1), 4);
    }
};

struct WeightIQ4_XS : LargeBlockWeight<base::BlockIQ4_XS> {
    static constexpr bool is_signed = true, is_joint = true;
    static constexpr int run = 16;
    using LargeBlockWeight::LargeBlockWeight;

    LOWBIT_INLINE_LAMBDA inline UnitCodes load(int64_t i) {
        const int half = begin_unit(i, [this]() LOWBIT_INLINE_LAMBDA { base::scales_of_iq4_xs(block, scales); });
        UnitCodes unit;
        split_nibbles(_mm512_loadu_si512(block + 8 + 64 * half), unit);
        look_up_iq4(unit);
        unit.scale[0] = _mm512_permutexvar_ps(groups_from<4>(4 * half), _mm512_load_ps(scales));
        return unit;
    }

    LOWBIT_INLINE_LAMBDA static inline __m512 product(const UnitCodes& weight, const Unit& unit) {
        return joint_product<true, true, false>(weight, unit);
    }
};

struct GgufIntegers {
    int number;  // ggml's, of the type
    const UnitRowsKernels* kernels;
};

constexpr GgufIntegers kGgufIntegers[] = {
    {2, &kIntegerKernels<WeightOf32<base::BlockQ4_0, false, false>>},
    {3, &kIntegerKernels<WeightOf32<base::BlockQ4_1, true, false>>},
    {6, &kIntegerKernels<WeightOf32<base::BlockQ5_0, false, true>>},
    {7, &kIntegerKernels<WeightOf32<base::BlockQ5_1, true, true>>},
    {8, &kIntegerKernels<WeightQ8_0>},
    {10, &kIntegerKernels<WeightQ2_K>},
    {11, &kIntegerKernels<WeightQ3_K>},
    {12, &kIntegerKernels<WeightQ45_K<base::BlockQ4_K, false>>},
    {13, &kIntegerKernels<WeightQ45_K<base::BlockQ5_K, true>>},
    {14, &kIntegerKernels<WeightQ6_K>},
    {20, &kIntegerKernels<WeightIQ4_NL>},
    {23, &kIntegerKernels<WeightIQ4_XS>},
};

// The kernels for a weight, or null where there are none.
const UnitRowsKernels* gguf_rows(const GgufRows& rows, int64_t depth) {
    for (const GgufIntegers& known : kGgufIntegers)
        if (known.number == rows.kernels->number && depth % kKTile == 0) return known.kernels;
    return nullptr;
}

LOWBIT_END
#endif  // LOWBIT_NATIVE_KERNELS_INTEGER_GGUF_H
