// Quantizing, dequantizing and scaling.
//
// Plain loops that compilers vectorize; selects instead of branches. Numbers must equal the plain-torch references bit
// for bit, so divisions stay divisions, multiplications and additions are not contracted, and rounding is to nearest
// even everywhere.
#ifndef LOWBIT_NATIVE_KERNELS_QUANTIZE_H
#define LOWBIT_NATIVE_KERNELS_QUANTIZE_H

#include "../kernel_set.h"
#include "../target.h"

LOWBIT_BEGIN(base)

LOWBIT_INLINE float widen(float value) { return value; }

LOWBIT_INLINE float widen(BFloat16 value) { return as_float(static_cast<uint32_t>(value.bits) << 16); }

LOWBIT_INLINE float widen(Half value) {
    const uint32_t magnitude = value.bits & 0x7fffu;
    const uint32_t normal = (magnitude << 13) + (112u << 23);
    const uint32_t special = (magnitude << 13) | 0x7f800000u;  // infinity and NaN
    const uint32_t subnormal = as_bits(static_cast<float>(static_cast<int32_t>(magnitude)) * 0x1p-24f);
    uint32_t bits = magnitude < 0x400u ? subnormal : normal;
    bits = magnitude >= 0x7c00u ? special : bits;
    return as_float(bits | (static_cast<uint32_t>(value.bits & 0x8000u) << 16));
}

LOWBIT_INLINE float widen(Int8 code) { return static_cast<float>(static_cast<int8_t>(code.bits)); }

LOWBIT_INLINE float widen(E4M3 code) {
    const uint32_t magnitude = code.bits & 0x7fu;
    const uint32_t normal = (magnitude << 20) + (120u << 23);
    const uint32_t subnormal = as_bits(static_cast<float>(static_cast<int32_t>(magnitude)) * 0x1p-9f);
    uint32_t bits = magnitude < 8u ? subnormal : normal;
    bits = magnitude == 0x7fu ? 0x7fc00000u : bits;
    return as_float(bits | (static_cast<uint32_t>(code.bits & 0x80u) << 24));
}

LOWBIT_INLINE void narrow(float value, float& result) { result = value; }

LOWBIT_INLINE void narrow(float value, BFloat16& result) {
    const uint32_t bits = as_bits(value);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    result.bits = static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

LOWBIT_INLINE void narrow(float value, Half& result) {
    const uint32_t bits = as_bits(value);
    const uint32_t magnitude = bits & 0x7fffffffu;
    const uint32_t normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
    const uint32_t subnormal = as_bits(as_float(magnitude) + 0.5f) - as_bits(0.5f);
    const uint32_t special = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
    uint32_t half = magnitude < 0x38800000u ? subnormal : normal;
    half = magnitude >= 0x47800000u ? special : half;
    result.bits = static_cast<uint16_t>(half | ((bits >> 16) & 0x8000u));
}

// Adding 1.5 * 2**23 rounds to an integer, which is then in the low bits of the sum. |value| <= 127.5.
LOWBIT_INLINE void narrow(float value, Int8& code) { code.bits = static_cast<uint8_t>(as_bits(value + 12582912.0f)); }

LOWBIT_INLINE void narrow(float value, Uint8& code) { code.bits = static_cast<uint8_t>(as_bits(value + 12582912.0f) + 128u); }

// |value| <= 448 up to rounding of the division, or NaN.
LOWBIT_INLINE void narrow(float value, E4M3& code) {
    const uint32_t bits = as_bits(value);
    uint32_t magnitude = bits & 0x7fffffffu;
    const bool nan = magnitude > 0x7f800000u;
    magnitude = magnitude > 0x43e00000u ? 0x43e00000u : magnitude;  // 448
    const uint32_t normal = (magnitude - (120u << 23) + 0x7ffffu + ((magnitude >> 20) & 1u)) >> 20;
    const uint32_t subnormal = as_bits(as_float(magnitude) + 16384.0f) - as_bits(16384.0f);  // unit 2**-9
    const uint32_t rounded = (magnitude < 0x3c800000u ? subnormal : normal) | ((bits >> 24) & 0x80u);
    code.bits = static_cast<uint8_t>(nan ? 0x7fu : rounded);
}

// The largest magnitude; NaN counts as larger than infinity, because bit patterns are compared.
LOWBIT_INLINE uint32_t largest(const float* values, int64_t count, uint32_t start) {
    int32_t result = static_cast<int32_t>(start);
    for (int64_t i = 0; i < count; ++i) {
        const int32_t magnitude = static_cast<int32_t>(as_bits(values[i]) & 0x7fffffffu);
        result = magnitude > result ? magnitude : result;
    }
    return static_cast<uint32_t>(result);
}

template <typename Input>
LOWBIT_INLINE uint32_t largest(const Input* values, int64_t count, uint32_t start) {
    int16_t result = static_cast<int16_t>(start);
    for (int64_t i = 0; i < count; ++i) {
        const int16_t magnitude = static_cast<int16_t>(values[i].bits & 0x7fffu);
        result = magnitude > result ? magnitude : result;
    }
    return static_cast<uint32_t>(result);
}

LOWBIT_INLINE float magnitude_of(uint32_t bits, const float*) { return as_float(bits); }

template <typename Input>
LOWBIT_INLINE float magnitude_of(uint32_t bits, const Input*) {
    Input value;
    value.bits = static_cast<uint16_t>(bits);
    return widen(value);
}

template <typename Input, typename Code>
LOWBIT_INLINE void encode(const Input* input, int64_t count, float scale, Code* output) {
    for (int64_t i = 0; i < count; ++i) narrow(widen(input[i]) / scale, output[i]);
}

#ifdef LOWBIT_AVX512
LOWBIT_INLINE __m512 load_wide(const float* from) { return _mm512_loadu_ps(from); }
LOWBIT_INLINE __m512 load_wide(const BFloat16* from) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}
LOWBIT_INLINE __m512 load_wide(const Half* from) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}

LOWBIT_INLINE void store_narrow(float* to, __mmask16 mask, __m512 value) { _mm512_mask_storeu_ps(to, mask, value); }
LOWBIT_INLINE void store_narrow(Half* to, __mmask16 mask, __m512 value) {
    _mm256_mask_storeu_epi16(to, mask, _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
LOWBIT_INLINE void store_narrow(BFloat16* to, __mmask16 mask, __m512 value) {
    const __m512i bits = _mm512_castps_si512(value);
    const __m512i last = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), last);
    rounded = _mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc00000));
    _mm256_mask_storeu_epi16(to, mask, _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16)));
}

// Values / 256 as float16, rounded to e4m3 before: adding 1.5 * 2**20 times the power of two at or below a value leaves it
// three bits after the first; e4m3's smallest such power is 2**-6.
template <typename Input>
LOWBIT_INLINE __m256i round_to_e4m3(const Input* input, __m512 divisor) {
    const __m512i exponent = _mm512_set1_epi32(0x7f800000), smallest = _mm512_set1_epi32((127 - 6 - 8) << 23);
    const __m512 value = _mm512_div_ps(load_wide(input), divisor);
    const __m512i bits = _mm512_castps_si512(value);
    const __m512i power = _mm512_max_epi32(_mm512_and_si512(bits, exponent), smallest);
    const __m512i adder = _mm512_or_si512(_mm512_add_epi32(power, _mm512_set1_epi32(20 << 23)), _mm512_set1_epi32(1 << 22));
    const __m512 rounder = _mm512_castsi512_ps(adder);
    const __m512 rounded = _mm512_sub_ps(_mm512_add_ps(value, rounder), rounder);
    const __m512i sign = _mm512_and_si512(bits, _mm512_set1_epi32(static_cast<int>(0x80000000u)));  // also of zero
    return _mm512_cvtps_ph(_mm512_castsi512_ps(_mm512_or_si512(_mm512_castps_si512(rounded), sign)), _MM_FROUND_TO_NEAREST_INT);
}

// As the loop above. A float16 below 2 has e4m3's code of 256 times its value after the sign and a zero.
template <typename Input>
LOWBIT_INLINE void encode(const Input* input, int64_t count, float scale, E4M3* output) {
    const __m512 divisor = _mm512_set1_ps(scale * 256.0f);
    int64_t i = 0;
    for (; i + 32 <= count; i += 32) {
        const __m512i low = _mm512_castsi256_si512(round_to_e4m3(input + i, divisor));
        const __m512i half = _mm512_inserti64x4(low, round_to_e4m3(input + i + 16, divisor), 1);
        const __m512i sign = _mm512_and_si512(_mm512_srli_epi16(half, 8), _mm512_set1_epi16(0x80));
        const __m512i codes = _mm512_or_si512(_mm512_srli_epi16(half, 7), sign);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(output + i), _mm512_cvtepi16_epi8(codes));
    }
    for (; i < count; ++i) narrow(widen(input[i]) / scale, output[i]);
}

// As the loop, which divides: a product with the inverse is as good unless it is close to where rounding turns, as few are.
template <typename Input, typename Code>
LOWBIT_INLINE void encode_integers(const Input* input, int64_t count, float scale, Code* output, int offset) {
    constexpr int kAtOnce = 4;
    const __m512 inverse = _mm512_set1_ps(1.0f / scale), rounder = _mm512_set1_ps(12582912.0f), turn = _mm512_set1_ps(0.4999f);
    int64_t i = 0;
    for (; i + 16 * kAtOnce <= count; i += 16 * kAtOnce) {
        __m512 shifted[kAtOnce];
        int unsure = 0;
#pragma GCC unroll 4
        for (int j = 0; j < kAtOnce; ++j) {
            const __m512 value = _mm512_mul_ps(load_wide(input + i + 16 * j), inverse);
            shifted[j] = _mm512_add_ps(value, rounder);
            const __m512 rest = _mm512_sub_ps(value, _mm512_sub_ps(shifted[j], rounder));
            unsure |= _mm512_cmp_ps_mask(_mm512_abs_ps(rest), turn, _CMP_GT_OQ);
        }
        if (unsure)
            for (int j = 0; j < kAtOnce; ++j)
                shifted[j] = _mm512_add_ps(_mm512_div_ps(load_wide(input + i + 16 * j), _mm512_set1_ps(scale)), rounder);
#pragma GCC unroll 4
        for (int j = 0; j < kAtOnce; ++j) {
            const __m512i code = _mm512_add_epi32(_mm512_castps_si512(shifted[j]), _mm512_set1_epi32(offset));
            _mm_storeu_si128(reinterpret_cast<__m128i*>(output + i + 16 * j), _mm512_cvtepi32_epi8(code));
        }
    }
    for (; i < count; ++i) narrow(widen(input[i]) / scale, output[i]);
}

template <typename Input>
LOWBIT_INLINE void encode(const Input* input, int64_t count, float scale, Int8* output) {
    encode_integers(input, count, scale, output, 0);
}

template <typename Input>
LOWBIT_INLINE void encode(const Input* input, int64_t count, float scale, Uint8* output) {
    encode_integers(input, count, scale, output, 128);
}
#endif

// A block with NaN or infinity. Integers become zero: the scale, which is not finite, carries the fact.
template <typename Input, typename Code>
void encode_not_finite(const Input* input, int64_t count, float scale, Code* output) {
    for (int64_t i = 0; i < count; ++i) {
        if (Code::integer) {
            narrow(0.0f, output[i]);
        } else {
            const float value = widen(input[i]) / scale;
            narrow((as_bits(value) & 0x7f800000u) == 0x7f800000u ? as_float(0x7fc00000u) : value, output[i]);
        }
    }
}

// Blocks of rows [first, last) of the grid of blocks.
template <typename Input, typename Code>
void quantize(const QuantizeJob& job, int64_t first, int64_t last) {
    const auto* input = static_cast<const Input*>(job.input);
    auto* output = static_cast<Code*>(job.output);
    const int64_t grid_columns = blocks(job.columns, job.block_columns);
    if (job.is_large) {
        const int64_t begin = first * job.block_rows, end = smaller(last * job.block_rows, job.rows);
        populate(output + begin * job.columns, (end - begin) * job.columns);
    }
    for (int64_t grid_row = first; grid_row < last; ++grid_row) {
        const int64_t row_begin = grid_row * job.block_rows;
        const int64_t row_end = smaller(row_begin + job.block_rows, job.rows);
        for (int64_t grid_column = 0; grid_column < grid_columns; ++grid_column) {
            const int64_t column = grid_column * job.block_columns;
            const int64_t count = smaller(job.block_columns, job.columns - column);
            uint32_t bits = 0;
            for (int64_t row = row_begin; row < row_end; ++row) bits = largest(input + row * job.stride + column, count, bits);
            const float absmax = magnitude_of(bits, input);
            const bool finite = (as_bits(absmax) & 0x7f800000u) != 0x7f800000u;
            const float scale = (finite && absmax < 1e-30f ? 1e-30f : absmax) / Code::largest;
            job.scale[grid_row * grid_columns + grid_column] = scale;
            for (int64_t row = row_begin; row < row_end; ++row) {
                const Input* from = input + row * job.stride + column;
                Code* to = output + row * job.columns + column;
                if (finite) encode(from, count, scale, to);
                else encode_not_finite(from, count, scale, to);
            }
        }
    }
}

template <typename Code, typename Output>
LOWBIT_INLINE void decode(const Code* input, int64_t count, float scale, Output* output) {
    for (int64_t i = 0; i < count; ++i) narrow(widen(input[i]) * scale, output[i]);
}

#ifdef LOWBIT_AVX512
constexpr int64_t kCodesWorthATable = 512;  // with one scale

// With 512-bit registers the 128 magnitudes, scaled and rounded, fit four registers of 16-bit words: 32 codes are
// decoded by two table look-ups.
template <typename Output>
LOWBIT_INLINE void decode_by_table(const E4M3* input, int64_t count, float scale, Output* output) {
    if (count < kCodesWorthATable) {
        for (int64_t i = 0; i < count; ++i) narrow(widen(input[i]) * scale, output[i]);
        return;
    }
    alignas(64) Output table[128];
    for (int code = 0; code < 128; ++code) narrow(widen(E4M3{static_cast<uint8_t>(code)}) * scale, table[code]);
    const __m512i table0 = _mm512_load_si512(table), table1 = _mm512_load_si512(table + 32);
    const __m512i table2 = _mm512_load_si512(table + 64), table3 = _mm512_load_si512(table + 96);
    int64_t i = 0;
    for (; i + 32 <= count; i += 32) {
        const __m512i code = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(input + i)));
        const __m512i low = _mm512_permutex2var_epi16(table0, code, table1);
        const __m512i high = _mm512_permutex2var_epi16(table2, code, table3);
        const __mmask32 is_high = _mm512_test_epi16_mask(code, _mm512_set1_epi16(0x40));
        const __m512i sign = _mm512_slli_epi16(_mm512_and_si512(code, _mm512_set1_epi16(0x80)), 8);
        const __m512i value = _mm512_xor_si512(_mm512_mask_mov_epi16(low, is_high, high), sign);
        _mm512_storeu_si512(output + i, value);
    }
    for (; i < count; ++i) {
        output[i] = table[input[i].bits & 0x7fu];
        output[i].bits ^= static_cast<uint16_t>((input[i].bits & 0x80u) << 8);
    }
}

LOWBIT_INLINE void decode(const E4M3* input, int64_t count, float scale, BFloat16* output) {
    decode_by_table(input, count, scale, output);
}

LOWBIT_INLINE void decode(const E4M3* input, int64_t count, float scale, Half* output) {
    decode_by_table(input, count, scale, output);
}
#endif

// Rows [first, last) of the matrix.
template <typename Code, typename Output>
void dequantize(const DequantizeJob& job, int64_t first, int64_t last) {
    const auto* input = static_cast<const Code*>(job.input);
    auto* output = static_cast<Output*>(job.output);
    const int64_t grid_columns = blocks(job.columns, job.block_columns);
    for (int64_t row = first; row < last; ++row) {
        const float* scales = job.scale + ((row + job.first_row) / job.block_rows) * grid_columns;
        for (int64_t grid_column = 0; grid_column < grid_columns; ++grid_column) {
            const int64_t column = grid_column * job.block_columns;
            const int64_t count = smaller(job.block_columns, job.columns - column);
            decode(input + row * job.columns + column, count, scales[grid_column], output + row * job.columns + column);
        }
    }
}

LOWBIT_INLINE float widen_e2m1(uint32_t code) {
    const uint32_t magnitude = code & 7u;
    const uint32_t normal = (magnitude << 22) + (126u << 23);
    const uint32_t bits = magnitude < 2u ? magnitude * 0x3f000000u : normal;  // 0, 0.5
    return as_float(bits | ((code & 8u) << 28));
}

// Bytes of two e2m1 codes each, the first in the low nibble -> 2 * count values times scale.
LOWBIT_INLINE void decode_nibbles(const uint8_t* input, int64_t count, float scale, float* output) {
    int64_t i = 0;
#ifdef LOWBIT_AVX512
    const __m512 values = _mm512_mul_ps(
        _mm512_setr_ps(0.0f, 0.5f, 1.0f, 1.5f, 2.0f, 3.0f, 4.0f, 6.0f, -0.0f, -0.5f, -1.0f, -1.5f, -2.0f, -3.0f, -4.0f, -6.0f),
        _mm512_set1_ps(scale));
    const __m128i mask = _mm_set1_epi8(15);
    for (; i + 8 <= count; i += 8) {
        const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(input + i));
        const __m128i high = _mm_and_si128(_mm_srli_epi16(bytes, 4), mask);
        const __m128i codes = _mm_unpacklo_epi8(_mm_and_si128(bytes, mask), high);
        _mm512_storeu_ps(output + 2 * i, _mm512_permutexvar_ps(_mm512_cvtepu8_epi32(codes), values));
    }
#endif
    for (; i < count; ++i) {
        output[2 * i] = widen_e2m1(input[i] & 15u) * scale;
        output[2 * i + 1] = widen_e2m1(input[i] >> 4) * scale;
    }
}

template <typename Output>
LOWBIT_INLINE void decode_nibbles(const uint8_t* input, int64_t count, float scale, Output* output) {
    constexpr int64_t kAtOnce = 16;
    float values[2 * kAtOnce];
    for (int64_t i = 0; i < count; i += kAtOnce) {
        const int64_t part = smaller(kAtOnce, count - i);
        decode_nibbles(input + i, part, scale, values);
        for (int64_t j = 0; j < 2 * part; ++j) narrow(values[j], output[2 * i + j]);
    }
}

// Rows [first, last) of the matrix.
template <typename Output>
void decode_fp4(const Fp4Job& job, int64_t first, int64_t last) {
    const int64_t groups = blocks(job.columns, job.group_size);
    for (int64_t row = first; row < last; ++row) {
        const uint8_t* from = job.input + row * (job.columns / 2);
        Output* to = static_cast<Output*>(job.output) + row * job.columns;
        for (int64_t group = 0; group < groups; ++group) {
            const int64_t column = group * job.group_size;
            const int64_t count = smaller(job.group_size, job.columns - column);
            decode_nibbles(from + column / 2, count / 2, job.scale[row * groups + group], to + column);
        }
    }
}

template <typename Output, bool HasScale, bool HasBias>
LOWBIT_INLINE void scale_row(const float* input, int64_t count, float row_scale, const float* column_scale, const float* bias,
                             Output* output) {
    for (int64_t i = 0; i < count; ++i) {
        const float value = HasScale ? input[i] * row_scale * column_scale[i] : input[i];
        narrow(HasBias ? value + bias[i] : value, output[i]);
    }
}

template <typename Output, bool HasScale, bool HasBias>
LOWBIT_INLINE void scale_rows(const ScaleJob& job, int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) {
        Output* to = static_cast<Output*>(job.output) + row * job.output_stride;
        const float row_scale = HasScale ? job.row_scale[row] : 1.0f;
        const float* from = job.product + row * job.columns;
        scale_row<Output, HasScale, HasBias>(from, job.columns, row_scale, job.column_scale, job.bias, to);
    }
}

// Rows [first, last) of a product: times the row's and the column's scale, plus bias, rounded once.
template <typename Output>
void scale_product(const ScaleJob& job, int64_t first, int64_t last) {
    if (job.row_scale && job.bias) scale_rows<Output, true, true>(job, first, last);
    else if (job.row_scale) scale_rows<Output, true, false>(job, first, last);
    else if (job.bias) scale_rows<Output, false, true>(job, first, last);
    else scale_rows<Output, false, false>(job, first, last);
}

LOWBIT_END
#endif  // LOWBIT_NATIVE_KERNELS_QUANTIZE_H
