// Codes of 8- and 4-bit weights as float32, and their scales.
// A value is (code - zero) * scale rounded to float32, as in the references.
#ifndef LOWBIT_NATIVE_KERNELS_WEIGHT_CODES_H
#define LOWBIT_NATIVE_KERNELS_WEIGHT_CODES_H

#include "quantize.h"

LOWBIT_BEGIN(base)

#if defined(LOWBIT_AVX512)
constexpr int kLanes = 16;
using Lanes = __m512;
LOWBIT_INLINE Lanes zero_lanes() { return _mm512_setzero_ps(); }
LOWBIT_INLINE Lanes load_lanes(const float* from) { return _mm512_loadu_ps(from); }
LOWBIT_INLINE Lanes multiply_add(Lanes a, Lanes b, Lanes sum) { return _mm512_fmadd_ps(a, b, sum); }
LOWBIT_INLINE void store_lanes(float* to, Lanes value) { _mm512_storeu_ps(to, value); }
#elif defined(LOWBIT_AVX2)
constexpr int kLanes = 8;
using Lanes = __m256;
LOWBIT_INLINE Lanes zero_lanes() { return _mm256_setzero_ps(); }
LOWBIT_INLINE Lanes load_lanes(const float* from) { return _mm256_loadu_ps(from); }
LOWBIT_INLINE Lanes multiply_add(Lanes a, Lanes b, Lanes sum) { return _mm256_fmadd_ps(a, b, sum); }
LOWBIT_INLINE void store_lanes(float* to, Lanes value) { _mm256_storeu_ps(to, value); }
#elif defined(LOWBIT_NEON)
constexpr int kLanes = 4;
using Lanes = float32x4_t;
LOWBIT_INLINE Lanes zero_lanes() { return vdupq_n_f32(0.0f); }
LOWBIT_INLINE Lanes load_lanes(const float* from) { return vld1q_f32(from); }
LOWBIT_INLINE Lanes multiply_add(Lanes a, Lanes b, Lanes sum) { return vfmaq_f32(sum, a, b); }
LOWBIT_INLINE void store_lanes(float* to, Lanes value) { vst1q_f32(to, value); }
#else
constexpr int kLanes = 4;
struct Lanes {
    float lane[kLanes];
};
LOWBIT_INLINE Lanes zero_lanes() { return Lanes{}; }
LOWBIT_INLINE Lanes load_lanes(const float* from) {
    Lanes value;
    for (int i = 0; i < kLanes; ++i) value.lane[i] = from[i];
    return value;
}
LOWBIT_INLINE Lanes multiply_add(Lanes a, Lanes b, Lanes sum) {
    for (int i = 0; i < kLanes; ++i) sum.lane[i] += a.lane[i] * b.lane[i];
    return sum;
}
LOWBIT_INLINE void store_lanes(float* to, Lanes value) {
    for (int i = 0; i < kLanes; ++i) to[i] = value.lane[i];
}
#endif

constexpr int kTileChannels = 4;
constexpr int kTaskChannels = 2 * kTileChannels;  // of a task of weight_only.h
constexpr int64_t kChunk = 512;                   // inputs decoded at a time

LOWBIT_INLINE float total(Lanes value) {
    float lanes[kLanes];
    store_lanes(lanes, value);
    for (int width = kLanes / 2; width > 0; width /= 2)
        for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
    return lanes[0];
}

// 2 to the power of code - 127; NaN for 255. The smallest is below float32's normal numbers.
LOWBIT_INLINE float widen_e8m0(uint32_t code) {
    return as_float(code == 255 ? 0x7fc00000u : code == 0 ? 0x00400000u : code << 23);
}

LOWBIT_INLINE float widen_e4m3(uint32_t code) {
    E4M3 value{static_cast<uint8_t>(code)};
    float wide;
    decode(&value, 1, 1.0f, &wide);
    return wide;
}

LOWBIT_INLINE float scale_at(const WeightJob& job, int64_t index) {
    switch (job.scale_type) {
        case kScaleFloat32: return static_cast<const float*>(job.scale)[index];
        case kScaleBFloat16: return widen(static_cast<const BFloat16*>(job.scale)[index]);
        case kScaleE8M0: return widen_e8m0(static_cast<const uint8_t*>(job.scale)[index]);
        default: return widen_e4m3(static_cast<const uint8_t*>(job.scale)[index]);
    }
}

// a / b without dividing, which takes as long as decoding a register, where b is a power of two or larger than a.
LOWBIT_INLINE int64_t quotient(int64_t a, int64_t b) {
#if defined(__GNUC__) || defined(__clang__)
    if ((b & (b - 1)) == 0) return a >> __builtin_ctzll(static_cast<unsigned long long>(b));
#endif
    return a < b ? 0 : a / b;
}

LOWBIT_INLINE int64_t quotient_up(int64_t a, int64_t b) { return a <= b ? a > 0 : quotient(a + b - 1, b); }

LOWBIT_INLINE float outer_scale_at(const WeightJob& job, int64_t channel, int64_t input) {
    if (!job.outer_scale) return 1.0f;
    if (!job.outer_columns) return job.outer_scale[0];
    return job.outer_scale[channel * quotient_up(job.depth, job.outer_columns) + quotient(input, job.outer_columns)];
}

// Of the block that begins at an input of a channel: its scale times the outer one.
LOWBIT_INLINE float scale_at(const WeightJob& job, int64_t index, int64_t channel, int64_t input) {
    return scale_at(job, index) * outer_scale_at(job, channel, input);
}

// The zero point of a block of int4.
LOWBIT_INLINE float zero_at(const WeightJob& job, int64_t index) {
    return job.zero_point ? static_cast<const uint8_t*>(job.zero_point)[index] : 8.0f;
}

LOWBIT_INLINE void decode_codes(const Int8* input, int64_t count, float scale, float* output) {
    decode(input, count, scale, output);
}

// e4m3 is the upper byte of a float16 whose exponent is 8 larger: a shift, a conversion that knows subnormal numbers, and
// 256 times the scale. Returns how many were decoded: none if there is a NaN, which float16 would not have there.
LOWBIT_INLINE int64_t decode_as_half(const uint8_t* input, int64_t count, float factor, float* output) {
    int64_t i = 0;
#if defined(LOWBIT_AVX512)
    const __m256i magnitude = _mm256_set1_epi8(0x7f);
    __m256i largest_code = _mm256_setzero_si256();
    for (; i + 32 <= count; i += 32) {
        const __m256i codes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(input + i));
        largest_code = _mm256_max_epu8(largest_code, _mm256_and_si256(codes, magnitude));
        const __m512i half =
            _mm512_and_si512(_mm512_slli_epi16(_mm512_cvtepi8_epi16(codes), 7), _mm512_set1_epi16(static_cast<int16_t>(0xbf80)));
        const __m512 low = _mm512_cvtph_ps(_mm512_castsi512_si256(half));
        const __m512 high = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(half, 1));
        _mm512_storeu_ps(output + i, _mm512_mul_ps(low, _mm512_set1_ps(factor)));
        _mm512_storeu_ps(output + i + 16, _mm512_mul_ps(high, _mm512_set1_ps(factor)));
    }
    if (_mm256_movemask_epi8(_mm256_cmpeq_epi8(largest_code, magnitude))) return 0;
#elif defined(LOWBIT_AVX2)
    const __m128i magnitude = _mm_set1_epi8(0x7f);
    __m128i largest_code = _mm_setzero_si128();
    for (; i + 16 <= count; i += 16) {
        const __m128i codes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(input + i));
        largest_code = _mm_max_epu8(largest_code, _mm_and_si128(codes, magnitude));
        const __m256i half =
            _mm256_and_si256(_mm256_slli_epi16(_mm256_cvtepi8_epi16(codes), 7), _mm256_set1_epi16(static_cast<int16_t>(0xbf80)));
        const __m256 low = _mm256_cvtph_ps(_mm256_castsi256_si128(half));
        const __m256 high = _mm256_cvtph_ps(_mm256_extracti128_si256(half, 1));
        _mm256_storeu_ps(output + i, _mm256_mul_ps(low, _mm256_set1_ps(factor)));
        _mm256_storeu_ps(output + i + 8, _mm256_mul_ps(high, _mm256_set1_ps(factor)));
    }
    if (_mm_movemask_epi8(_mm_cmpeq_epi8(largest_code, magnitude))) return 0;
#elif defined(LOWBIT_NEON)
    uint8x16_t largest_code = vdupq_n_u8(0);
    for (; i + 16 <= count; i += 16) {
        const uint8x16_t codes = vld1q_u8(input + i);
        largest_code = vmaxq_u8(largest_code, vandq_u8(codes, vdupq_n_u8(0x7f)));
        const int16x8_t wide[2] = {vmovl_s8(vreinterpret_s8_u8(vget_low_u8(codes))),
                                   vmovl_s8(vreinterpret_s8_u8(vget_high_u8(codes)))};
        for (int j = 0; j < 2; ++j) {
            const uint16x8_t half = vandq_u16(vreinterpretq_u16_s16(vshlq_n_s16(wide[j], 7)), vdupq_n_u16(0xbf80));
            const float32x4_t low = vcvt_f32_f16(vreinterpret_f16_u16(vget_low_u16(half)));
            const float32x4_t high = vcvt_f32_f16(vreinterpret_f16_u16(vget_high_u16(half)));
            vst1q_f32(output + i + 8 * j, vmulq_n_f32(low, factor));
            vst1q_f32(output + i + 8 * j + 4, vmulq_n_f32(high, factor));
        }
    }
    if (vmaxvq_u8(largest_code) == 0x7f) return 0;
#endif
    return i;
}

LOWBIT_INLINE void decode_codes(const E4M3* input, int64_t count, float scale, float* output) {
    const float factor = scale * 256.0f;
    const bool finite = (as_bits(factor) & 0x7f800000u) != 0x7f800000u;
    const int64_t done = finite ? decode_as_half(&input->bits, count, factor, output) : 0;
    decode(input + done, count - done, scale, output + done);
}

// Codes of inputs [first, first + count) of one channel, whose scales change every block_columns.
template <typename Code>
LOWBIT_INLINE void decode_chunk(const WeightJob& job, int64_t channel, int64_t first, int64_t count, float* output, Code) {
    const Code* codes = static_cast<const Code*>(job.weight) + channel * job.depth + first;
    int64_t block = first / job.block_columns, left = (block + 1) * job.block_columns - first;
    int64_t scale = channel / job.block_rows * blocks(job.depth, job.block_columns) + block;
    for (int64_t done = 0; done < count; ++scale, left = job.block_columns) {
        const int64_t part = smaller(left, count - done);
        decode_codes(codes + done, part, scale_at(job, scale, channel, first + done), output + done);
        done += part;
    }
}

struct Int4 {};  // two in a byte, the even input in the lower half
struct E2M1 {};  // likewise

template <typename Code>
constexpr int kBits = 8;
template <>
constexpr int kBits<Int4> = 4;
template <>
constexpr int kBits<E2M1> = 4;

// Of each 32 inputs the even ones, then the odd ones.
LOWBIT_INLINE void decode_group(const uint8_t* codes, int64_t count, float zero, float scale, float* output) {
#if defined(LOWBIT_AVX512)
    const __m512 code = _mm512_set_ps(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const __m512 table = _mm512_mul_ps(_mm512_sub_ps(code, _mm512_set1_ps(zero)), _mm512_set1_ps(scale));
#endif
    for (int64_t i = 0; i < count; i += 32, codes += 16, output += 32) {
#if defined(LOWBIT_AVX512)
        const __m512i pairs = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)));
        _mm512_storeu_ps(output, _mm512_permutexvar_ps(pairs, table));
        _mm512_storeu_ps(output + 16, _mm512_permutexvar_ps(_mm512_srli_epi32(pairs, 4), table));
#else
        for (int j = 0; j < 16; ++j) {
            output[j] = (static_cast<float>(codes[j] & 15) - zero) * scale;
            output[16 + j] = (static_cast<float>(codes[j] >> 4) - zero) * scale;
        }
#endif
    }
}

// As above; in the order of the split activations.
LOWBIT_INLINE void decode_chunk(const WeightJob& job, int64_t channel, int64_t first, int64_t count, float* output, Int4) {
    const uint8_t* codes = static_cast<const uint8_t*>(job.weight) + (channel * job.depth + first) / 2;
    int64_t block = first / job.block_columns, left = (block + 1) * job.block_columns - first;
    int64_t group = channel * (job.depth / job.block_columns) + block;
    for (int64_t done = 0; done < count; ++group, left = job.block_columns) {
        const int64_t part = smaller(left, count - done);
        decode_group(codes + done / 2, part, zero_at(job, group), scale_at(job, group), output + done);
        done += part;
    }
}

// As above, in the inputs' own order.
LOWBIT_INLINE void decode_chunk(const WeightJob& job, int64_t channel, int64_t first, int64_t count, float* output, E2M1) {
    const uint8_t* codes = static_cast<const uint8_t*>(job.weight) + (channel * job.depth + first) / 2;
    int64_t block = first / job.block_columns, left = (block + 1) * job.block_columns - first;
    int64_t group = channel * blocks(job.depth, job.block_columns) + block;
    for (int64_t done = 0; done < count; ++group, left = job.block_columns) {
        const int64_t part = smaller(left, count - done);
        decode_nibbles(codes + done / 2, part / 2, scale_at(job, group, channel, first + done), output + done);
        done += part;
    }
}

LOWBIT_INLINE void write_result(const WeightJob& job, int64_t row, int64_t column, float value) {
    const int64_t at = row * job.columns + column;
    if (job.bias) value += job.bias[column];
    if (job.element_type == 0) narrow(value, static_cast<float*>(job.output)[at]);
    else if (job.element_type == 1) narrow(value, static_cast<BFloat16*>(job.output)[at]);
    else narrow(value, static_cast<Half*>(job.output)[at]);
}

#if defined(LOWBIT_AVX512)
constexpr int64_t kStep = 16;  // inputs of a register

// Whether a register's inputs always have one scale.
LOWBIT_INLINE bool has_even_blocks(const WeightJob& job) {
    return job.block_columns % kStep == 0 || job.block_columns >= job.depth;
}

// Scales of consecutive blocks; `scales` has room for a multiple of 16. Whole registers are stored: what reads a masked store
// would wait until it is in the cache. Not inlined: the same for every weight.
[[maybe_unused]] LOWBIT_NOINLINE void load_scales(const WeightJob& job, int64_t index, int64_t count, float* scales) {
    const auto* codes = static_cast<const uint8_t*>(job.scale) + index;  // of the types of a byte
    if (job.scale_type == 3) return decode_codes(reinterpret_cast<const E4M3*>(codes), count, 1.0f, scales);
    if (job.scale_type == 0) {
        const float* from = static_cast<const float*>(job.scale) + index;
        for (int64_t i = 0; i < count; i += kStep) {
            const auto mask = static_cast<__mmask16>(count - i >= kStep ? 0xffff : (1u << (count - i)) - 1);
            store_lanes(scales + i, _mm512_maskz_loadu_ps(mask, from + i));
        }
        return;
    }
    if (job.scale_type == 1) {
        const auto* from = static_cast<const BFloat16*>(job.scale) + index;
        for (int64_t i = 0; i < count; i += kStep) {
            const auto mask = static_cast<__mmask16>(count - i >= kStep ? 0xffff : (1u << (count - i)) - 1);
            const __m512i wide = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, from + i));
            store_lanes(scales + i, _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16)));
        }
        return;
    }
    for (int64_t i = 0; i < count; i += kStep) {
        const auto mask = static_cast<__mmask16>(count - i >= kStep ? 0xffff : (1u << (count - i)) - 1);
        // What is beyond the last is 1: multiplying numbers below the normal ones takes long.
        const __m512i wide = _mm512_cvtepu8_epi32(_mm_mask_loadu_epi8(_mm_set1_epi8(127), mask, codes + i));
        __m512i bits = _mm512_slli_epi32(wide, 23);
        bits = _mm512_mask_mov_epi32(bits, _mm512_testn_epi32_mask(wide, wide), _mm512_set1_epi32(0x00400000));
        bits = _mm512_mask_mov_epi32(bits, _mm512_cmpeq_epi32_mask(wide, _mm512_set1_epi32(255)), _mm512_set1_epi32(0x7fc00000));
        store_lanes(scales + i, _mm512_castsi512_ps(bits));
    }
}

// For each register of inputs [first, first + count) of a channel, where a chunk begins: its scale.
LOWBIT_INLINE void spread_scales(const WeightJob& job, int64_t channel, int64_t first, int64_t count, float* scales) {
    const int64_t steps = blocks(count, kStep), per_row = quotient_up(job.depth, job.block_columns);
    const int64_t row = quotient(channel, job.block_rows) * per_row;
    const float outer = outer_scale_at(job, channel, first);
    float found[kChunk / kStep];
    const int64_t block = quotient(first, job.block_columns), within = first - block * job.block_columns;
    load_scales(job, row + block, quotient_up(within + count, job.block_columns), found);
    if (within + count <= job.block_columns) {
        for (int64_t step = 0; step < steps; ++step) scales[step] = found[0] * outer;
    } else if (kChunk % job.block_columns == 0) {  // as here most often, and without branches in the loop
        int shift = 0;
        while (kStep << shift < job.block_columns) ++shift;
        for (int64_t step = 0; step < steps; ++step) scales[step] = found[step >> shift] * outer;
    } else {
        int64_t at = 0, left = job.block_columns - within;
        for (int64_t step = 0; step < steps; ++step, left -= kStep) {
            if (left <= 0) ++at, left += job.block_columns;
            scales[step] = found[at] * outer;
        }
    }
    scales[steps] = 0.0f;  // of the half that a last pair of registers may lack
}

template <typename Code>
LOWBIT_INLINE const Code* channel_codes(const WeightJob& job, int64_t channel) {
    return reinterpret_cast<const Code*>(static_cast<const uint8_t*>(job.weight) + channel * job.depth * kBits<Code> / 8);
}

LOWBIT_INLINE __mmask32 first_inputs(int64_t count) { return count >= 32 ? ~0u : (1u << count) - 1u; }

// Two registers of inputs [i, i + 32) of a channel, unscaled; codes beyond the last of `left` are 0.
LOWBIT_INLINE void decode_steps(const Int8* codes, int64_t i, int64_t left, Lanes* values) {
    const __m256i bytes = _mm256_maskz_loadu_epi8(first_inputs(left), codes + i);
    values[0] = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_castsi256_si128(bytes)));
    values[1] = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_extracti128_si256(bytes, 1)));
}

LOWBIT_INLINE void decode_steps(const E4M3* codes, int64_t i, int64_t left, Lanes* values) {
    const __m256i bytes = _mm256_maskz_loadu_epi8(first_inputs(left), codes + i), magnitude = _mm256_set1_epi8(0x7f);
    const uint32_t not_numbers = _mm256_cmpeq_epi8_mask(_mm256_and_si256(bytes, magnitude), magnitude);
    const __m512i half =
        _mm512_and_si512(_mm512_slli_epi16(_mm512_cvtepi8_epi16(bytes), 7), _mm512_set1_epi16(static_cast<int16_t>(0xbf80)));
    const Lanes exponent = _mm512_set1_ps(256.0f), nan = _mm512_set1_ps(as_float(0x7fc00000u));
    values[0] = _mm512_mul_ps(_mm512_cvtph_ps(_mm512_castsi512_si256(half)), exponent);
    values[1] = _mm512_mul_ps(_mm512_cvtph_ps(_mm512_extracti64x4_epi64(half, 1)), exponent);
    if (not_numbers) {
        values[0] = _mm512_mask_mov_ps(values[0], static_cast<__mmask16>(not_numbers), nan);
        values[1] = _mm512_mask_mov_ps(values[1], static_cast<__mmask16>(not_numbers >> 16), nan);
    }
}

// Inputs [first, first + count) of a channel, where a chunk begins, to output float32.
template <typename Code>
LOWBIT_INLINE void decode_to(const WeightJob& job, int64_t channel, int64_t first, int64_t count, float* output, Code) {
    if (!has_even_blocks(job)) return decode_chunk(job, channel, first, count, output, Code{});
    float scales[kChunk / kStep + 1];
    const Code* codes = channel_codes<Code>(job, channel);
    spread_scales(job, channel, first, count, scales);
    for (int64_t i = 0; i < count; i += 2 * kStep) {
        Lanes values[2];
        decode_steps(codes, first + i, count - i, values);
        for (int step = 0; step < 2; ++step)
            store_lanes(output + i + step * kStep, _mm512_mul_ps(values[step], _mm512_set1_ps(scales[i / kStep + step])));
    }
}

#endif

LOWBIT_END
#endif  // LOWBIT_NATIVE_KERNELS_WEIGHT_CODES_H
