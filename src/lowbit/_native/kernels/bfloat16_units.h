// Up to four rows of bfloat16 times weights of 8 and 4 bits that are looked up in registers and multiplied there, by AVX512-BF16:
// without what integers of 16 bits take beside products (integer_rows.h), and nothing is written between.
//
// A register of codes becomes words of bfloat16, exactly, in the order that costs least, and the activations are brought to it.
// Scales are multiplied with the sums.
#ifndef LOWBIT_NATIVE_KERNELS_BFLOAT16_UNITS_H
#define LOWBIT_NATIVE_KERNELS_BFLOAT16_UNITS_H

#include "bfloat16_decode.h"
#include "unit_rows.h"

LOWBIT_BEGIN(gemm)

using vnni::GroupedChannel;
using vnni::has_whole_units;
using vnni::is_whole;
using vnni::kUnitProducts;

constexpr int64_t kUnitWords = 4;  // registers of words that a unit becomes

struct alignas(64) Unit {
    BFloat16 words[kUnitWords][kWords];
};

struct UnitCodes {
    __m512i words[kUnitWords];
    __m512 scale[2], minimum;  // of the first and the second half of the words; the minimum is multiplied with unit_floats
};

LOWBIT_INLINE __m512 dot_words(__m512 sum, __m512i left, __m512i right) {
    return _mm512_dpbf16_ps(sum, reinterpret_cast<const __m512bh&>(left), reinterpret_cast<const __m512bh&>(right));
}

// See unit_rows.h.
struct WordUnits {
    using Unit = gemm::Unit;
    using Codes = UnitCodes;
    static constexpr int64_t unit_floats = 16;  // for zero points: what codes of 1 would give

    // Adds the products of a unit of some channels and a row to their sums; `ones` are unit_floats.
    template <typename Weight, int kChannels>
    LOWBIT_INLINE_LAMBDA static inline void add_products(const Codes (&weights)[kChannels], const Unit& unit, const float* ones,
                                                         __m512 (&sums)[kChannels]) {
        constexpr int kTogether = Weight::unit_scales == 2 ? 2 : kUnitWords;
#pragma GCC unroll 2
        for (int first = 0; first < kUnitWords; first += kTogether) {
            __m512 parts[kChannels];
#pragma GCC unroll 4
            for (__m512& part : parts) part = _mm512_setzero_ps();
#pragma GCC unroll 4
            for (int r = first; r < first + kTogether; ++r) {
                const __m512i x = _mm512_load_si512(unit.words[r]);
#pragma GCC unroll 4
                for (int c = 0; c < kChannels; ++c) parts[c] = dot_words(parts[c], x, weights[c].words[r]);
            }
#pragma GCC unroll 4
            for (int c = 0; c < kChannels; ++c) {
                if (Weight::unit_scales) sums[c] = _mm512_fmadd_ps(parts[c], weights[c].scale[first / kTogether], sums[c]);
                else sums[c] = _mm512_add_ps(parts[c], sums[c]);
            }
        }
        if (!Weight::has_minimum) return;
#pragma GCC unroll 4
        for (int c = 0; c < kChannels; ++c) sums[c] = _mm512_fnmadd_ps(weights[c].minimum, _mm512_loadu_ps(ones), sums[c]);
    }
};

// The activation that is multiplied with word k of register r. Words of codes of 4 bits hold four of them, those of 8 bits two.
template <int kBits>
LOWBIT_INLINE int64_t place_of(int64_t r, int64_t k) {
    return kBits == 4 ? 4 * k + r : r / 2 * 2 * kWords + 2 * k + r % 2;
}

// Units [first, last) of all rows.
template <typename Weight>
void arrange_units(const UnitRowsJob& job, int64_t first, int64_t last) {
    const int64_t units = job.depth / kKTile;
    for (; first < last; ++first) {
        const auto* x = static_cast<const BFloat16*>(job.x) + first / units * job.x_stride + first % units * kKTile;
        Unit& unit = static_cast<Unit*>(job.units)[first];
        for (int64_t r = 0; r < kUnitWords; ++r)
            for (int64_t k = 0; k < kWords; ++k) unit.words[r][k] = x[place_of<Weight::bits>(r, k)];
        if (!Weight::has_minimum) continue;
        for (int64_t lane = 0; lane < 16; ++lane) {
            float sum = 0.0f;
            for (int64_t r = 0; r < kUnitWords; ++r) sum += widen(unit.words[r][2 * lane]) + widen(unit.words[r][2 * lane + 1]);
            job.unit_floats[first * WordUnits::unit_floats + lane] = sum;
        }
    }
}

// Of words with a sign, four bits of exponent and three of mantissa as bfloat16 has them, those whose exponent is 0 or that are
// not a number: what widen_e4m3_apart would not give.
LOWBIT_NOINLINE __m512i mend_e4m3(__m512i bits, __m512i words) {
    // m / 512, by m
    const __m512i subnormal = _mm512_set4_epi32(0x3c603c40, 0x3c203c00, 0x3bc03b80, 0x3b000000);
    const __m512i found = _mm512_permutexvar_epi16(_mm512_srli_epi16(bits, 4), subnormal);
    const __m512i sign = _mm512_and_si512(bits, _mm512_set1_epi16(static_cast<int16_t>(0x8000)));
    words = _mm512_mask_mov_epi16(words, _mm512_testn_epi16_mask(bits, _mm512_set1_epi16(0x0780)), _mm512_or_si512(found, sign));
    const __m512i magnitude = _mm512_and_si512(bits, _mm512_set1_epi16(0x07f0));
    return _mm512_mask_mov_epi16(words, _mm512_cmpeq_epi16_mask(magnitude, _mm512_set1_epi16(0x07f0)), _mm512_set1_epi16(0x7fc0));
}

// 64 codes of E4M3 -> bfloat16, the even ones, then the odd ones.
LOWBIT_INLINE void widen_e4m3_apart(__m512i codes, __m512i* words) {
    const __m512i kept = _mm512_set1_epi16(static_cast<int16_t>(0x87f0)), bias = _mm512_set1_epi16((127 - 7) << 7);
    const __m512i even = _mm512_and_si512(_mm512_srai_epi16(_mm512_slli_epi16(codes, 8), 4), kept);
    const __m512i odd = _mm512_and_si512(_mm512_srai_epi16(codes, 4), kept);
    words[0] = _mm512_add_epi16(even, bias), words[1] = _mm512_add_epi16(odd, bias);
    const __m512i above = _mm512_sub_epi8(_mm512_add_epi8(codes, codes), _mm512_set1_epi8(16));  // of twice the magnitude
    if (_mm512_cmpge_epu8_mask(above, _mm512_set1_epi8(static_cast<char>(2 * 0x7f - 16))))
        words[0] = mend_e4m3(even, words[0]), words[1] = mend_e4m3(odd, words[1]);
}

// 128 codes of 4 bits -> the words of a table that holds the 16 of them twice.
LOWBIT_INLINE void look_up_nibbles(__m512i codes, __m512i table, __m512i* words) {
#pragma GCC unroll 4
    for (int r = 0; r < kUnitWords; ++r) words[r] = _mm512_permutexvar_epi16(r ? _mm512_srli_epi16(codes, 4 * r) : codes, table);
}

template <typename Code, bool kIsWhole, bool kHasZero>
struct WordWeight : GroupedChannel<Code, kIsWhole, kHasZero> {
    using Units = WordUnits;
    using Channel = GroupedChannel<Code, kIsWhole, kHasZero>;
    static constexpr bool has_minimum = kHasZero;
    static constexpr int bits = base::kBits<Code>, unit_scales = kIsWhole ? 0 : bits == 4 ? 1 : 2;

    const __m512i groups[2];
    __m512i table;
    __m512 minimum;

    explicit WordWeight(const void* weight)
        : Channel(weight), groups{this->groups_of_lanes(0, unit_scales), this->groups_of_lanes(1, unit_scales)} {
        if constexpr (bits == 4) {
            const __m512 values = base::table_of(Code{}, kHasZero ? 0.0f : 8.0f);
            table = round_pair(values, values);
        }
    }

    LOWBIT_INLINE_LAMBDA inline float begin(int64_t channel) {
        const float factor = Channel::begin(channel);
        minimum = _mm512_set1_ps(this->zero);
        return factor;
    }

    LOWBIT_INLINE_LAMBDA inline UnitCodes load(int64_t i) const {
        UnitCodes unit;
        const __m512i codes = _mm512_loadu_si512(this->at(i));
        if constexpr (bits == 4) {
            look_up_nibbles(codes, table, unit.words);
        } else {
            widen_e4m3_apart(codes, unit.words);
            widen_e4m3_apart(_mm512_loadu_si512(this->at(i) + 64), unit.words + 2);
        }
        for (int part = 0; part < unit_scales; ++part) unit.scale[part] = this->of_lanes(this->scales, i, groups[part]);
        unit.minimum = minimum;
        if (kHasZero && !kIsWhole) unit.minimum = _mm512_mul_ps(this->of_lanes(this->zeros, i, groups[0]), unit.scale[0]);
        return unit;
    }
};

template <typename Weight>
constexpr UnitRowsKernels kWordKernels{
    {nullptr, nullptr, arrange_units<Weight>}, kUnitProducts<Weight>, sizeof(Unit), WordUnits::unit_floats};

template <typename Code, bool kHasZero>
const UnitRowsKernels* word_kernels(const WeightJob& job) {
    return is_whole(job) ? &kWordKernels<WordWeight<Code, true, kHasZero>> : &kWordKernels<WordWeight<Code, false, kHasZero>>;
}

// The kernels for a weight, or null where there are none.
const UnitRowsKernels* weight_rows(const WeightJob& job, int weight_type) {
    if (!has_whole_units(job)) return nullptr;
    switch (weight_type) {
        case kWeightE4M3: return word_kernels<E4M3, false>(job);
        case kWeightInt4: return job.zero_point ? word_kernels<Int4, true>(job) : word_kernels<Int4, false>(job);
        case kWeightE2M1: return word_kernels<E2M1, false>(job);
        default: return nullptr;
    }
}

LOWBIT_END
#endif  // LOWBIT_NATIVE_KERNELS_BFLOAT16_UNITS_H
