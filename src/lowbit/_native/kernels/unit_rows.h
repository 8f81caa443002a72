// Up to four rows times weights whose codes are multiplied in the registers that they are read into, a unit of kKTile inputs after
// the other, as integers (integer_rows.h) or as bfloat16 (bfloat16_units.h).
//
// Those define `Units`: Unit, of activations, Codes, of a channel, unit_floats and add_products. A weight names its Units; it has
// `begin`, which returns what all sums of a channel are to be multiplied with, `at`, where the codes of a unit are, and `load`,
// which reads them.
#ifndef LOWBIT_NATIVE_KERNELS_UNIT_ROWS_H
#define LOWBIT_NATIVE_KERNELS_UNIT_ROWS_H

#include "transpose.h"
#include "weight_codes.h"

LOWBIT_BEGIN(vnni)

constexpr int64_t kMostGroups = 4096;  // of a channel, whose scales are held

LOWBIT_INLINE float low_rank_product(const LowRank& low_rank, int64_t row, int64_t channel) {
    __m512 sum = _mm512_setzero_ps();
    const BFloat16 *hidden = low_rank.hidden + row * low_rank.rank, *up = low_rank.up + channel * low_rank.rank;
    for (int64_t i = 0; i < low_rank.rank; i += 16) {
        const __mmask16 mask = static_cast<__mmask16>(low_rank.rank - i >= 16 ? 0xffff : (1u << (low_rank.rank - i)) - 1);
        const __m512i x = _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, hidden + i)), 16);
        const __m512i y = _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, up + i)), 16);
        sum = _mm512_fmadd_ps(_mm512_castsi512_ps(x), _mm512_castsi512_ps(y), sum);
    }
    return _mm512_reduce_add_ps(sum);
}

LOWBIT_INLINE void write_result(const UnitRowsJob& job, int64_t row, int64_t channel, float value) {
    const int64_t at = row * job.columns + channel;
    if (job.low_rank.rank) value += low_rank_product(job.low_rank, row, channel);
    if (job.bias) value += job.bias[channel];
    if (job.element_type == kBFloat16) narrow(value, static_cast<BFloat16*>(job.output)[at]);
    else narrow(value, static_cast<Half*>(job.output)[at]);
}

constexpr int kUnitsTogether = 2;  // channels at a time, so that activations are loaded once for them: those of four rows do not
                                   // fit all first-level caches

// Sums [rows][kUnitsTogether] of two channels, which may be the same, to the output. Not inlined: the same for every weight.
LOWBIT_NOINLINE void write_sums(const UnitRowsJob& job, const __m512* sums, int64_t rows, const float* factors,
                                const int64_t* channels) {
    for (int c = 0; c < kUnitsTogether; ++c)
        for (int64_t row = 0; row < rows; ++row)
            write_result(job, row, channels[c], _mm512_reduce_add_ps(sums[row * kUnitsTogether + c]) * factors[c]);
}

template <int kRows, typename Weight>
LOWBIT_INLINE void multiply_channels(const UnitRowsJob& job, const int64_t (&channels)[kUnitsTogether], Weight* weights) {
    using Units = typename Weight::Units;
    const int64_t units = job.depth / kKTile;
    const auto* all = static_cast<const typename Units::Unit*>(job.units);
    __m512 sums[kRows][kUnitsTogether];
    float factors[kUnitsTogether];
#pragma GCC unroll 4
    for (int c = 0; c < kUnitsTogether; ++c) {
        factors[c] = weights[c].begin(channels[c]);
#pragma GCC unroll 4
        for (int row = 0; row < kRows; ++row) sums[row][c] = _mm512_setzero_ps();
    }
    for (int64_t i = 0; i < units; ++i) {
        typename Units::Codes codes[kUnitsTogether];
#pragma GCC unroll 4
        for (int c = 0; c < kUnitsTogether; ++c) {
            for (int byte = 0; byte < Weight::unit_bytes; byte += 64)
                _mm_prefetch(reinterpret_cast<const char*>(weights[c].at(i)) + kBytesAhead + byte, _MM_HINT_T1);
            codes[c] = weights[c].load(i);
        }
#pragma GCC unroll 4
        for (int64_t row = 0, at = i; row < kRows; ++row, at += units)
            Units::template add_products<Weight>(codes, all[at], job.unit_floats + at * Units::unit_floats, sums[row]);
    }
    write_sums(job, sums[0], kRows, factors, channels);
}

// Groups [first, last) of kUnitChannels. A last channel without a second is multiplied twice.
template <typename Weight, int kRows>
void multiply_units(const UnitRowsJob& job, int64_t first, int64_t last) {
    Weight weights[kUnitsTogether] = {Weight(job.weight), Weight(job.weight)};
    const int64_t end = smaller(last * kUnitChannels, job.columns);
    for (int64_t channel = first * kUnitChannels; channel < end; channel += kUnitsTogether)
        multiply_channels<kRows>(job, {channel, smaller(channel + 1, end - 1)}, weights);
}

// By the number of rows, less one.
template <typename Weight>
constexpr UnitRowsKernel kUnitProducts[kFewRows] = {multiply_units<Weight, 1>, multiply_units<Weight, 2>,
                                                    multiply_units<Weight, 3>, multiply_units<Weight, 4>};

// A channel of a WeightJob, whose depth is a multiple of kKTile, and which has so many groups of equal size in a unit, or one scale.
template <typename Code, bool kIsWhole, bool kHasZero>
struct GroupedChannel {
    static constexpr int unit_bytes = kKTile * base::kBits<Code> / 8;
    using Zero = typename std::conditional<std::is_same<Code, Int8>::value, int16_t, uint8_t>::type;

    const WeightJob& job;
    const int64_t groups, in_unit;
    float zero = 0.0f;  // of a whole channel
    const uint8_t* codes;
    alignas(64) float scales[kIsWhole ? 16 : kMostGroups + 16], zeros[kIsWhole || !kHasZero ? 16 : kMostGroups + 16];

    explicit GroupedChannel(const void* weight)
        : job(*static_cast<const WeightJob*>(weight)),
          groups(kIsWhole ? 1 : job.depth / job.block_columns),
          in_unit(kIsWhole ? 0 : kKTile / job.block_columns) {}

    // Returns what all sums of a channel are to be multiplied with.
    LOWBIT_INLINE_LAMBDA inline float begin(int64_t channel) {
        const int64_t index = base::quotient(channel, job.block_rows) * groups;
        codes = static_cast<const uint8_t*>(job.weight) + channel * (job.depth * base::kBits<Code> / 8);
        const auto* points = static_cast<const Zero*>(job.zero_point) + index;
        if (kHasZero && kIsWhole) zero = points[0];
        if (kIsWhole) return base::scale_at(job, index, channel, 0);
        base::load_scales(job, index, groups, scales);
        if (job.outer_columns) multiply_outer_scales(channel);
        for (int64_t i = 0; kHasZero && i < groups; ++i) zeros[i] = points[i];
        return job.outer_scale && !job.outer_columns ? job.outer_scale[0] : 1.0f;
    }

    // Of 512 inputs, or a multiple, each; they are whole registers of scales, as has_whole_units sees to.
    LOWBIT_INLINE_LAMBDA inline void multiply_outer_scales(int64_t channel) {
        const float* outer = job.outer_scale + channel * base::quotient_up(job.depth, job.outer_columns);
        const int64_t count = job.outer_columns / job.block_columns;
        for (int64_t i = 0; i < groups; i += count, ++outer)
            for (int64_t j = i; j < smaller(i + count, groups); j += 16)
                _mm512_storeu_ps(scales + j, _mm512_mul_ps(_mm512_loadu_ps(scales + j), _mm512_set1_ps(*outer)));
    }

    LOWBIT_INLINE_LAMBDA inline const uint8_t* at(int64_t i) const { return codes + i * unit_bytes; }

    // Of each lane, of which `parts` registers of 16 take the groups of a unit one after the other, those of register r.
    LOWBIT_INLINE_LAMBDA inline __m512i groups_of_lanes(int r, int parts) const {
        const __m512i places = _mm512_add_epi32(lane_numbers(), _mm512_set1_epi32(16 * r));
        return _mm512_srli_epi32(_mm512_mullo_epi32(places, _mm512_set1_epi32(static_cast<int>(in_unit))), 3 + parts);
    }

    // What `of_groups` has for each lane of unit i.
    LOWBIT_INLINE_LAMBDA inline __m512 of_lanes(const float* of_groups, int64_t i, __m512i group_of_lane) const {
        return _mm512_permutexvar_ps(group_of_lane, _mm512_castps256_ps512(_mm256_loadu_ps(of_groups + i * in_unit)));
    }
};

inline bool is_whole(const WeightJob& job) { return job.block_columns >= job.depth; }

// Whether a channel is what GroupedChannel reads.
inline bool has_whole_units(const WeightJob& job) {
    const bool is_even =
        kKTile % job.block_columns == 0 && job.block_columns >= 16 && job.depth / job.block_columns <= kMostGroups;
    return job.depth % kKTile == 0 && (is_whole(job) || is_even) && !(job.outer_columns && job.block_columns > 32);
}

LOWBIT_END
#endif  // LOWBIT_NATIVE_KERNELS_UNIT_ROWS_H
