// Up to four rows of activations times weights whose codes are integers of up to 8 bits, by the instruction that multiplies
// bytes: it takes less time than memory takes to give the codes, which decoding them does not.
//
// Activations become integers of 16 bits, with a power of two as scale for each kKTile of them: a bfloat16, which has eight bits,
// is rounded only if it is less than 1/128 of its unit's largest. Their upper and lower bytes are multiplied with the codes
// apart, and the sums of a unit are exact. A unit that holds an infinity or a NaN makes the results of its row NaN.
#ifndef LOWBIT_NATIVE_KERNELS_INTEGER_ROWS_H
#define LOWBIT_NATIVE_KERNELS_INTEGER_ROWS_H

#include "unit_rows.h"

LOWBIT_BEGIN(vnni)

using base::E2M1;
using base::Int4;

struct alignas(64) Unit {
    int8_t upper[2][64];  // byte b of register r belongs to the code that a weight loads there
    uint8_t lower[2][64];
    float sums[2][16];  // what codes of 1 in each register would give; where lanes of both are added: in both, to the first.
                        // The second is then, of signed codes, the bits of int32: what takes an offset of 128 from the
                        // products with `upper`
};

// The place of the activation of byte b of register r: registers take kRun activations in turn.
template <int kRun>
LOWBIT_INLINE int64_t place_of(int64_t r, int64_t b) {
    return b / kRun * 2 * kRun + r * kRun + b % kRun;
}

// Finds the integers of a unit, in the activations' order. A scale is at least 2**-109, far from where products vanish.
template <typename Input>
LOWBIT_INLINE float round_unit(const Input* x, int16_t* codes) {
    constexpr uint32_t kSmallest = 32, kInfinite = 255;
    float values[kKTile];
    uint32_t largest = kSmallest << 23;
    for (int64_t i = 0; i < kKTile; ++i) {
        values[i] = widen(x[i]);
        const uint32_t magnitude = as_bits(values[i]) & 0x7fffffffu;
        largest = magnitude > largest ? magnitude : largest;
    }
    const uint32_t exponent = largest >> 23;
    if (exponent == kInfinite) {
        std::memset(codes, 0, kKTile * sizeof *codes);
        return as_float(0x7fc00000u);
    }
    const float inverse = as_float((254 - exponent + 14) << 23);
    for (int64_t i = 0; i < kKTile; ++i) {
        const float code = std::nearbyintf(values[i] * inverse);  // below 2**15, or 2**15 of a float32
        codes[i] = static_cast<int16_t>(code < 32767.0f ? code : 32767.0f);
    }
    return as_float((exponent - 14) << 23);
}

// Units [first, last) of all rows, in the order of registers that take kRun activations in turn.
template <typename Weight, int kRun, typename Input>
void round_activations(const UnitRowsJob& job, int64_t first, int64_t last) {
    const int64_t units = job.depth / kKTile;
    for (; first < last; ++first) {
        int16_t codes[kKTile];
        Unit& unit = static_cast<Unit*>(job.units)[first];
        job.unit_floats[first] =
            round_unit(static_cast<const Input*>(job.x) + first / units * job.x_stride + first % units * kKTile, codes);
        int32_t sums[2][16] = {};
        for (int64_t r = 0; r < 2; ++r)
            for (int64_t b = 0; b < 64; ++b) {
                const int16_t code = codes[place_of<kRun>(r, b)];
                unit.upper[r][b] = static_cast<int8_t>(code >> 8);
                unit.lower[r][b] = static_cast<uint8_t>(code & 255);
                sums[Weight::is_joint ? 0 : r][b / 4] += code;
                if (Weight::is_signed) sums[1][b / 4] -= (code >> 8) * 128;
            }
        for (int64_t lane = 0; lane < 16; ++lane) {
            unit.sums[0][lane] = static_cast<float>(sums[0][lane]);
            unit.sums[1][lane] =
                Weight::is_signed ? as_float(static_cast<uint32_t>(sums[1][lane])) : static_cast<float>(sums[1][lane]);
        }
    }
}

// What a weight loads of a channel for a unit: codes, what each lane's sums are multiplied with, and what is subtracted from a
// code times that.
struct UnitCodes {
    __m512i codes[2];
    __m512 scale[2], minimum[2];
};

// The exact sums of the products of registers kFirst ... kLast.
template <bool kIsSigned, int kFirst, int kLast>
LOWBIT_INLINE __m512 dot(const UnitCodes& weight, const Unit& unit) {
    __m512i sum = kIsSigned ? _mm512_load_si512(unit.sums[1]) : _mm512_setzero_si512();
#pragma GCC unroll 2
    for (int r = kFirst; r <= kLast; ++r) {
        const __m512i codes = kIsSigned ? _mm512_xor_si512(weight.codes[r], _mm512_set1_epi8(-128)) : weight.codes[r];
        sum = _mm512_dpbusd_epi32(sum, codes, _mm512_load_si512(unit.upper[r]));
    }
    sum = _mm512_slli_epi32(sum, 8);
#pragma GCC unroll 2
    for (int r = kFirst; r <= kLast; ++r) sum = _mm512_dpbusd_epi32(sum, _mm512_load_si512(unit.lower[r]), weight.codes[r]);
    return _mm512_cvtepi32_ps(sum);
}

// A lane's codes of both registers have one scale.
template <bool kIsSigned, bool kIsScaled, bool kHasMinimum>
LOWBIT_INLINE __m512 joint_product(const UnitCodes& weight, const Unit& unit) {
    __m512 value = dot<kIsSigned, 0, 1>(weight, unit);
    if (kIsScaled) value = _mm512_mul_ps(value, weight.scale[0]);
    return kHasMinimum ? _mm512_fnmadd_ps(weight.minimum[0], _mm512_load_ps(unit.sums[0]), value) : value;
}

// Each register has its own.
LOWBIT_INLINE __m512 apart_product(const UnitCodes& weight, const Unit& unit) {
    __m512 value = _mm512_mul_ps(dot<false, 0, 0>(weight, unit), weight.scale[0]);
    value = _mm512_fmadd_ps(dot<false, 1, 1>(weight, unit), weight.scale[1], value);
    value = _mm512_fnmadd_ps(_mm512_load_ps(unit.sums[0]), weight.minimum[0], value);
    return _mm512_fnmadd_ps(_mm512_load_ps(unit.sums[1]), weight.minimum[1], value);
}

// See unit_rows.h.
struct IntegerUnits {
    using Unit = vnni::Unit;
    using Codes = UnitCodes;
    static constexpr int64_t unit_floats = 1;  // a unit's scale

    // Adds the products of a unit of some channels and a row to their sums.
    template <typename Weight, int kChannels>
    LOWBIT_INLINE_LAMBDA static inline void add_products(const Codes (&weights)[kChannels], const Unit& unit, const float* scale,
                                                         __m512 (&sums)[kChannels]) {
#pragma GCC unroll 4
        for (int c = 0; c < kChannels; ++c)
            sums[c] = _mm512_fmadd_ps(Weight::product(weights[c], unit), _mm512_set1_ps(*scale), sums[c]);
    }
};

LOWBIT_INLINE __m512i low_nibbles(__m512i bytes) { return _mm512_and_si512(bytes, _mm512_set1_epi8(15)); }

LOWBIT_INLINE void load_codes(Int8, const uint8_t* from, UnitCodes& unit) {
    unit.codes[0] = _mm512_loadu_si512(from);
    unit.codes[1] = _mm512_loadu_si512(from + 64);
}

// Two codes in a byte.
LOWBIT_INLINE void split_nibbles(__m512i bytes, UnitCodes& unit) {
    unit.codes[0] = low_nibbles(bytes);
    unit.codes[1] = low_nibbles(_mm512_srli_epi16(bytes, 4));
}

LOWBIT_INLINE void load_codes(Int4, const uint8_t* from, UnitCodes& unit) { split_nibbles(_mm512_loadu_si512(from), unit); }

// Twice the values, plus 12.
LOWBIT_INLINE void load_codes(E2M1, const uint8_t* from, UnitCodes& unit) {
    const __m512i values = _mm512_set4_epi32(0x00040608, 0x090a0b0c, 0x18141210, 0x0f0e0d0c);
    split_nibbles(_mm512_loadu_si512(from), unit);
    for (__m512i& codes : unit.codes) codes = _mm512_shuffle_epi8(values, codes);
}

template <typename Code, bool kIsWhole, bool kHasZero>
struct GroupedWeight : GroupedChannel<Code, kIsWhole, kHasZero> {
    using Units = IntegerUnits;
    using Channel = GroupedChannel<Code, kIsWhole, kHasZero>;
    static constexpr bool is_signed = std::is_same<Code, Int8>::value, is_joint = true, has_minimum = kHasZero || !is_signed;
    static constexpr bool is_doubled = std::is_same<Code, E2M1>::value;
    static constexpr int run = is_signed ? 64 : 1;

    const __m512i group_of_lane;
    __m512 minimum;

    explicit GroupedWeight(const void* weight)
        : Channel(weight), group_of_lane(this->groups_of_lanes(0, 1)), minimum(_mm512_set1_ps(is_doubled ? 12.0f : 8.0f)) {}

    LOWBIT_INLINE_LAMBDA inline float begin(int64_t channel) {
        const float factor = Channel::begin(channel);
        if (kHasZero && kIsWhole) minimum = _mm512_set1_ps(this->zero);
        return is_doubled ? 0.5f * factor : factor;
    }

    LOWBIT_INLINE_LAMBDA inline UnitCodes load(int64_t i) {
        UnitCodes unit;
        load_codes(Code{}, this->at(i), unit);
        unit.minimum[0] = minimum;
        if (kIsWhole) return unit;
        unit.scale[0] = this->of_lanes(this->scales, i, group_of_lane);
        if (has_minimum)
            unit.minimum[0] = _mm512_mul_ps(kHasZero ? this->of_lanes(this->zeros, i, group_of_lane) : minimum, unit.scale[0]);
        return unit;
    }

    LOWBIT_INLINE_LAMBDA static inline __m512 product(const UnitCodes& weight, const Unit& unit) {
        return joint_product<is_signed, !kIsWhole, has_minimum>(weight, unit);
    }
};

template <typename Weight>
constexpr UnitRowsKernels kIntegerKernels{{round_activations<Weight, 16, float>, round_activations<Weight, Weight::run, float>,
                                           round_activations<Weight, Weight::run, BFloat16>},
                                          kUnitProducts<Weight>,
                                          sizeof(Unit),
                                          IntegerUnits::unit_floats};

template <typename Code, bool kHasZero>
const UnitRowsKernels* grouped_kernels(const WeightJob& job) {
    return is_whole(job) ? &kIntegerKernels<GroupedWeight<Code, true, kHasZero>>
                         : &kIntegerKernels<GroupedWeight<Code, false, kHasZero>>;
}

template <typename Code>
const UnitRowsKernels* grouped_kernels(const WeightJob& job) {
    return job.zero_point ? grouped_kernels<Code, true>(job) : grouped_kernels<Code, false>(job);
}

// The kernels for a weight, or null where there are none.
const UnitRowsKernels* weight_rows(const WeightJob& job, int weight_type) {
    if (!has_whole_units(job)) return nullptr;
    switch (weight_type) {
        case kWeightInt8: return is_whole(job) || job.block_columns == kKTile ? grouped_kernels<Int8>(job) : nullptr;
        case kWeightInt4: return grouped_kernels<Int4>(job);
        case kWeightE2M1: return grouped_kernels<E2M1, false>(job);
        default: return nullptr;
    }
}

LOWBIT_END
#endif  // LOWBIT_NATIVE_KERNELS_INTEGER_ROWS_H
