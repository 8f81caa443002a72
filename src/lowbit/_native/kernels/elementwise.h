// What transformers do between products, each in one pass: root-mean-square norms, rotary embeddings, gates.
#ifndef LOWBIT_NATIVE_KERNELS_ELEMENTWISE_H
#define LOWBIT_NATIVE_KERNELS_ELEMENTWISE_H

#include "quantize.h"

LOWBIT_BEGIN(base)

constexpr int64_t kPartialSums = 16;

LOWBIT_INLINE float sum_of_squares(const float* values, int64_t count) {
    float sums[kPartialSums] = {};
    int64_t i = 0;
    for (; i + kPartialSums <= count; i += kPartialSums)
        for (int64_t lane = 0; lane < kPartialSums; ++lane) sums[lane] += values[i + lane] * values[i + lane];
    for (; i < count; ++i) sums[i % kPartialSums] += values[i] * values[i];
    for (int64_t half = kPartialSums / 2; half > 0; half /= 2)
        for (int64_t lane = 0; lane < half; ++lane) sums[lane] += sums[lane + half];
    return sums[0];
}

// Row `row` of a matrix.
template <typename Element>
LOWBIT_INLINE void normalize_row(const NormalizeJob& job, const Element* from, const float* frequencies, Element* to) {
    alignas(64) float values[kLargestNormalized];
    const int64_t width = job.width;
    for (int64_t i = 0; i < width; ++i) values[i] = widen(from[i]);
    if (job.is_normalized) {
        const float factor = 1.0f / std::sqrt(sum_of_squares(values, width) / static_cast<float>(width) + job.epsilon);
        for (int64_t i = 0; i < width; ++i) values[i] *= factor;
    }
    if (job.weight)
        for (int64_t i = 0; i < width; ++i) values[i] *= job.weight[i];
    if (frequencies) {
        for (int64_t i = 0; i < width; i += 2) {
            const float real = values[i], imaginary = values[i + 1], cosine = frequencies[i], sine = frequencies[i + 1];
            values[i] = real * cosine - imaginary * sine;
            values[i + 1] = real * sine + imaginary * cosine;
        }
    }
    for (int64_t i = 0; i < width; ++i) narrow(values[i], to[i]);
}

#ifdef LOWBIT_AVX512
// The same of a multiple of 16 values, without a place in memory for them.
template <typename Element, bool HasWeight, bool HasFrequencies>
LOWBIT_INLINE void normalize_vectors(const NormalizeJob& job, const Element* from, const float* frequencies, Element* to) {
    __m512 factor = _mm512_set1_ps(1.0f);
    if (job.is_normalized) {
        __m512 sums = _mm512_setzero_ps();
        for (int64_t i = 0; i < job.width; i += 16) {
            const __m512 value = load_wide(from + i);
            sums = _mm512_fmadd_ps(value, value, sums);
        }
        const float mean = _mm512_reduce_add_ps(sums) / static_cast<float>(job.width);
        factor = _mm512_set1_ps(1.0f / std::sqrt(mean + job.epsilon));
    }
    for (int64_t i = 0; i < job.width; i += 16) {
        __m512 value = _mm512_mul_ps(load_wide(from + i), factor);
        if (HasWeight) value = _mm512_mul_ps(value, _mm512_loadu_ps(job.weight + i));
        if (HasFrequencies) {
            const __m512 frequency = _mm512_loadu_ps(frequencies + i);
            const __m512 crossed = _mm512_mul_ps(_mm512_permute_ps(value, 0xb1), _mm512_movehdup_ps(frequency));
            value = _mm512_fmaddsub_ps(value, _mm512_moveldup_ps(frequency), crossed);
        }
        store_narrow(to + i, 0xffff, value);
    }
}
#endif

// Rows [first, last).
template <typename Element>
void normalize(const NormalizeJob& job, int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) {
        const Element* from = static_cast<const Element*>(job.input) + row * job.width;
        Element* to = static_cast<Element*>(job.output) + row * job.width;
        const float* frequencies = job.frequencies ? job.frequencies + row / job.heads % job.positions * job.width : nullptr;
#ifdef LOWBIT_AVX512
        if (job.width % 16 == 0) {
            if (job.weight && frequencies) normalize_vectors<Element, true, true>(job, from, frequencies, to);
            else if (job.weight) normalize_vectors<Element, true, false>(job, from, frequencies, to);
            else if (frequencies) normalize_vectors<Element, false, true>(job, from, frequencies, to);
            else normalize_vectors<Element, false, false>(job, from, frequencies, to);
            continue;
        }
#endif
        normalize_row(job, from, frequencies, to);
    }
}

constexpr float kSeries[7] = {1.5403530e-4f, 1.3333558e-3f, 9.6181291e-3f, 5.5504109e-2f, 2.4022651e-1f, 6.9314718e-1f, 1.0f};

// 2 ** power by its Taylor series around the nearest integer, within 1.5e-7 of it; infinity from 128 on.
LOWBIT_INLINE float power_of_two(float power) {
    constexpr float kRounder = 12582912.0f;  // 1.5 * 2**23: adding it rounds to an integer, in the low bits of the sum
    power = power > 128.0f ? 128.0f : power;
    power = power < -126.0f ? -126.0f : power;
    const float rounded = power + kRounder;
    const float rest = power - (rounded - kRounder);
    float series = kSeries[0];
    for (int i = 1; i < 7; ++i) series = series * rest + kSeries[i];
    return series * as_float((as_bits(rounded) - as_bits(kRounder) + 127u) << 23);
}

constexpr float kLog2E = 1.44269504f;

template <typename Element>
LOWBIT_INLINE void gate_values(const Element* gates, const Element* values, int64_t count, Element* output) {
    for (int64_t i = 0; i < count; ++i) {
        const float x = widen(gates[i]);
        narrow(x / (1.0f + power_of_two(-kLog2E * x)) * widen(values[i]), output[i]);
    }
}

#ifdef LOWBIT_AVX512
LOWBIT_INLINE __m512 silu(__m512 x) {
    const __m512 limit = _mm512_set1_ps(150.0f);
    __m512 power = _mm512_mul_ps(x, _mm512_set1_ps(-kLog2E));
    power = _mm512_max_ps(_mm512_set1_ps(-150.0f), _mm512_min_ps(limit, power));  // NaN stays
    const __m512 whole = _mm512_roundscale_ps(power, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m512 rest = _mm512_sub_ps(power, whole);
    __m512 series = _mm512_set1_ps(kSeries[0]);
    for (int i = 1; i < 7; ++i) series = _mm512_fmadd_ps(series, rest, _mm512_set1_ps(kSeries[i]));
    return _mm512_div_ps(x, _mm512_add_ps(_mm512_scalef_ps(series, whole), _mm512_set1_ps(1.0f)));
}
#endif

// Pieces [first, last) of kElementsOfAPiece elements: silu(gate) * value.
template <typename Element>
void gate(const GateJob& job, int64_t first, int64_t last) {
    const auto *gates = static_cast<const Element*>(job.gate), *values = static_cast<const Element*>(job.value);
    auto* output = static_cast<Element*>(job.output);
    const int64_t end = smaller(last * kElementsOfAPiece, job.count);
    int64_t i = first * kElementsOfAPiece;
#ifdef LOWBIT_AVX512
    for (; i + 16 <= end; i += 16)
        store_narrow(output + i, 0xffff, _mm512_mul_ps(silu(load_wide(gates + i)), load_wide(values + i)));
#endif
    gate_values(gates + i, values + i, end - i, output + i);
}

LOWBIT_END
#endif  // LOWBIT_NATIVE_KERNELS_ELEMENTWISE_H
