// The AVX-512 intrinsics that the kernels use, as portable vector code for AVX2: the tests run every kernel of AVX-512,
// AVX512-VNNI, AVX512-BF16 and, with tiles.h, AMX on a CPU that has none of them. Never part of the library that is
// installed.
//
// Results are those that Intel's "Software Developer's Manual", volume 2, defines for each instruction, bit for bit: BF16
// dot products flush subnormal numbers, sums of dpbusd wrap, reductions add in the order of GCC's intrinsics. Ops of one
// line are inlined; the others are calls, which keeps the build short.
#ifndef LOWBIT_NATIVE_EMULATION_SIMD512_H
#define LOWBIT_NATIVE_EMULATION_SIMD512_H

#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>

#if !defined(__GNUC__) || defined(__clang__)
#error "the emulation needs GCC's vector extensions"
#endif

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")

namespace lowbit {
namespace emulation {

#define LOWBIT_EMULATED static inline __attribute__((always_inline))
#define LOWBIT_EMULATED_CALL [[maybe_unused]] static __attribute__((noinline))

// A register as its elements.
template <typename T, typename Register>
struct Lanes {
    static constexpr int count = sizeof(Register) / sizeof(T);
    T lane[count];

    Lanes() = default;
    Lanes(Register value) { std::memcpy(lane, &value, sizeof value); }
    operator Register() const {
        Register value;
        std::memcpy(&value, lane, sizeof value);
        return value;
    }
    T& operator[](int i) { return lane[i]; }
    const T& operator[](int i) const { return lane[i]; }
};
using Floats = Lanes<float, __m512>;
using Int32s = Lanes<int32_t, __m512i>;
using Uint32s = Lanes<uint32_t, __m512i>;
using Int16s = Lanes<int16_t, __m512i>;
using Uint16s = Lanes<uint16_t, __m512i>;
using Int8s = Lanes<int8_t, __m512i>;
using Uint8s = Lanes<uint8_t, __m512i>;
using Uint64s = Lanes<uint64_t, __m512i>;

LOWBIT_EMULATED uint32_t bits_of(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}
LOWBIT_EMULATED float float_of(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

// Casts and halves.
LOWBIT_EMULATED __m512i mm512_castps_si512(__m512 a) { return (__m512i)a; }
LOWBIT_EMULATED __m512 mm512_castsi512_ps(__m512i a) { return (__m512)a; }
LOWBIT_EMULATED __m256i mm512_extracti64x4_epi64(__m512i a, int half) {
    __m256i result;
    std::memcpy(&result, reinterpret_cast<const char*>(&a) + 32 * half, sizeof result);
    return result;
}
LOWBIT_EMULATED __m256i mm512_castsi512_si256(__m512i a) { return mm512_extracti64x4_epi64(a, 0); }
LOWBIT_EMULATED __m512i join(__m256i low, __m256i high) {
    __m512i result;
    std::memcpy(&result, &low, sizeof low);
    std::memcpy(reinterpret_cast<char*>(&result) + 32, &high, sizeof high);
    return result;
}
LOWBIT_EMULATED __m512 join(__m256 low, __m256 high) { return (__m512)join((__m256i)low, (__m256i)high); }
LOWBIT_EMULATED __m256 half_of(__m512 a, int half) { return (__m256)mm512_extracti64x4_epi64((__m512i)a, half); }
LOWBIT_EMULATED __m512i mm512_castsi256_si512(__m256i a) { return join(a, a); }  // the upper half is undefined
LOWBIT_EMULATED __m512 mm512_castps256_ps512(__m256 a) { return join(a, a); }
LOWBIT_EMULATED __m512i mm512_broadcast_i64x4(__m256i a) { return join(a, a); }
LOWBIT_EMULATED __m512 mm512_broadcast_f32x8(__m256 a) { return join(a, a); }
LOWBIT_EMULATED __m512i mm512_broadcast_i32x4(__m128i a) {
    const __m256i both = _mm256_broadcastsi128_si256(a);
    return join(both, both);
}
LOWBIT_EMULATED __m512 mm512_broadcast_f32x4(__m128 a) { return (__m512)mm512_broadcast_i32x4((__m128i)a); }
LOWBIT_EMULATED __m512i mm512_castsi128_si512(__m128i a) { return mm512_broadcast_i32x4(a); }
LOWBIT_EMULATED __m512i mm512_inserti64x4(__m512i a, __m256i b, int half) {
    std::memcpy(reinterpret_cast<char*>(&a) + 32 * half, &b, sizeof b);
    return a;
}
LOWBIT_EMULATED __m512i mm512_inserti32x4(__m512i a, __m128i b, int quarter) {
    std::memcpy(reinterpret_cast<char*>(&a) + 16 * quarter, &b, sizeof b);
    return a;
}
LOWBIT_EMULATED float mm512_cvtss_f32(__m512 a) { return ((__v16sf)a)[0]; }

// Constants.
LOWBIT_EMULATED __m512 mm512_setzero_ps() { return (__m512)(__v16sf){}; }
LOWBIT_EMULATED __m512i mm512_setzero_si512() { return (__m512i)(__v8di){}; }
LOWBIT_EMULATED __m512 mm512_set1_ps(float a) { return join(_mm256_set1_ps(a), _mm256_set1_ps(a)); }
LOWBIT_EMULATED __m512i mm512_set1_epi8(char a) { return join(_mm256_set1_epi8(a), _mm256_set1_epi8(a)); }
LOWBIT_EMULATED __m512i mm512_set1_epi16(int a) {
    return join(_mm256_set1_epi16(static_cast<short>(a)), _mm256_set1_epi16(static_cast<short>(a)));
}
LOWBIT_EMULATED __m512i mm512_set1_epi32(int a) { return join(_mm256_set1_epi32(a), _mm256_set1_epi32(a)); }
LOWBIT_EMULATED __m512i mm512_set1_epi64(long long a) { return join(_mm256_set1_epi64x(a), _mm256_set1_epi64x(a)); }
template <typename... T>
LOWBIT_EMULATED __m512 mm512_setr_ps(T... a) {
    return (__m512)(__v16sf){static_cast<float>(a)...};
}
template <typename... T>
LOWBIT_EMULATED __m512i mm512_setr_epi32(T... a) {
    return (__m512i)(__v16si){static_cast<int>(a)...};
}
template <typename... T>
LOWBIT_EMULATED __m512i mm512_setr_epi64(T... a) {
    return (__m512i)(__v8di){static_cast<long long>(a)...};
}
LOWBIT_EMULATED __m512i mm512_set_epi64(long long h, long long g, long long f, long long e, long long d, long long c, long long b,
                                        long long a) {
    return mm512_setr_epi64(a, b, c, d, e, f, g, h);
}
LOWBIT_EMULATED __m512i mm512_set4_epi32(int d, int c, int b, int a) {
    return mm512_setr_epi32(a, b, c, d, a, b, c, d, a, b, c, d, a, b, c, d);
}
LOWBIT_EMULATED __m512 mm512_set_ps(float p, float o, float n, float m, float l, float k, float j, float i, float h, float g,
                                    float f, float e, float d, float c, float b, float a) {
    return mm512_setr_ps(a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p);
}

// Memory. The aligned forms fault on addresses that are not, as the instructions do.
LOWBIT_EMULATED void check_aligned(const void* at) {
    if (reinterpret_cast<uintptr_t>(at) % 64) __builtin_trap();
}
LOWBIT_EMULATED __m512i mm512_loadu_si512(const void* from) {
    __m512i value;
    std::memcpy(&value, from, sizeof value);
    return value;
}
LOWBIT_EMULATED __m512 mm512_loadu_ps(const void* from) { return (__m512)mm512_loadu_si512(from); }
LOWBIT_EMULATED __m512i mm512_load_si512(const void* from) { return check_aligned(from), mm512_loadu_si512(from); }
LOWBIT_EMULATED __m512 mm512_load_ps(const void* from) { return check_aligned(from), mm512_loadu_ps(from); }
LOWBIT_EMULATED void mm512_storeu_si512(void* to, __m512i value) { std::memcpy(to, &value, sizeof value); }
LOWBIT_EMULATED void mm512_storeu_ps(void* to, __m512 value) { std::memcpy(to, &value, sizeof value); }
LOWBIT_EMULATED void mm512_store_si512(void* to, __m512i value) { check_aligned(to), mm512_storeu_si512(to, value); }
LOWBIT_EMULATED void mm512_store_ps(void* to, __m512 value) { check_aligned(to), mm512_storeu_ps(to, value); }

// Elements whose bit is not set are neither read nor written.
template <typename T, typename Register>
LOWBIT_EMULATED_CALL Register masked_load(Register otherwise, uint64_t mask, const void* from) {
    Lanes<T, Register> result = otherwise;
    for (int i = 0; i < result.count; ++i)
        if (mask >> i & 1) std::memcpy(&result[i], static_cast<const char*>(from) + i * sizeof(T), sizeof(T));
    return result;
}
template <typename T, typename Register>
LOWBIT_EMULATED_CALL void masked_store(void* to, uint64_t mask, Register value) {
    const Lanes<T, Register> lanes = value;
    for (int i = 0; i < lanes.count; ++i)
        if (mask >> i & 1) std::memcpy(static_cast<char*>(to) + i * sizeof(T), &lanes[i], sizeof(T));
}
LOWBIT_EMULATED __m512i mm512_maskz_loadu_epi8(__mmask64 mask, const void* from) {
    return masked_load<uint8_t>(mm512_setzero_si512(), mask, from);
}
LOWBIT_EMULATED __m512i mm512_maskz_loadu_epi16(__mmask32 mask, const void* from) {
    return masked_load<uint16_t>(mm512_setzero_si512(), mask, from);
}
LOWBIT_EMULATED __m512 mm512_maskz_loadu_ps(__mmask16 mask, const void* from) {
    return masked_load<float>(mm512_setzero_ps(), mask, from);
}
LOWBIT_EMULATED __m256i mm256_maskz_loadu_epi8(__mmask32 mask, const void* from) {
    return masked_load<uint8_t>(_mm256_setzero_si256(), mask, from);
}
LOWBIT_EMULATED __m256i mm256_maskz_loadu_epi16(__mmask16 mask, const void* from) {
    return masked_load<uint16_t>(_mm256_setzero_si256(), mask, from);
}
LOWBIT_EMULATED __m128i mm_maskz_loadu_epi8(__mmask16 mask, const void* from) {
    return masked_load<uint8_t>(_mm_setzero_si128(), mask, from);
}
LOWBIT_EMULATED __m128i mm_mask_loadu_epi8(__m128i otherwise, __mmask16 mask, const void* from) {
    return masked_load<uint8_t>(otherwise, mask, from);
}
LOWBIT_EMULATED void mm512_mask_storeu_ps(void* to, __mmask16 mask, __m512 value) { masked_store<float>(to, mask, value); }
LOWBIT_EMULATED void mm512_mask_storeu_epi32(void* to, __mmask16 mask, __m512i value) { masked_store<uint32_t>(to, mask, value); }
LOWBIT_EMULATED void mm256_mask_storeu_epi16(void* to, __mmask16 mask, __m256i value) { masked_store<uint16_t>(to, mask, value); }

// Arithmetic.
LOWBIT_EMULATED __m512 mm512_add_ps(__m512 a, __m512 b) { return (__m512)((__v16sf)a + (__v16sf)b); }
LOWBIT_EMULATED __m512 mm512_sub_ps(__m512 a, __m512 b) { return (__m512)((__v16sf)a - (__v16sf)b); }
LOWBIT_EMULATED __m512 mm512_mul_ps(__m512 a, __m512 b) { return (__m512)((__v16sf)a * (__v16sf)b); }
LOWBIT_EMULATED __m512 mm512_div_ps(__m512 a, __m512 b) { return (__m512)((__v16sf)a / (__v16sf)b); }
#define LOWBIT_BY_HALVES(name, of_half)                                                                                          \
    LOWBIT_EMULATED __m512 name(__m512 a, __m512 b, __m512 c) {                                                                  \
        return join(of_half(half_of(a, 0), half_of(b, 0), half_of(c, 0)), of_half(half_of(a, 1), half_of(b, 1), half_of(c, 1))); \
    }
LOWBIT_BY_HALVES(mm512_fmadd_ps, _mm256_fmadd_ps)
LOWBIT_BY_HALVES(mm512_fmsub_ps, _mm256_fmsub_ps)
LOWBIT_BY_HALVES(mm512_fnmadd_ps, _mm256_fnmadd_ps)
LOWBIT_BY_HALVES(mm512_fmaddsub_ps, _mm256_fmaddsub_ps)
#undef LOWBIT_BY_HALVES
LOWBIT_EMULATED __m512 mm512_max_ps(__m512 a, __m512 b) {
    return join(_mm256_max_ps(half_of(a, 0), half_of(b, 0)), _mm256_max_ps(half_of(a, 1), half_of(b, 1)));
}
LOWBIT_EMULATED __m512 mm512_min_ps(__m512 a, __m512 b) {
    return join(_mm256_min_ps(half_of(a, 0), half_of(b, 0)), _mm256_min_ps(half_of(a, 1), half_of(b, 1)));
}
#define LOWBIT_INTEGERS(name, of_half)                                                        \
    LOWBIT_EMULATED __m512i name(__m512i a, __m512i b) {                                      \
        return join(of_half(mm512_extracti64x4_epi64(a, 0), mm512_extracti64x4_epi64(b, 0)),  \
                    of_half(mm512_extracti64x4_epi64(a, 1), mm512_extracti64x4_epi64(b, 1))); \
    }
LOWBIT_INTEGERS(mm512_add_epi8, _mm256_add_epi8)
LOWBIT_INTEGERS(mm512_add_epi16, _mm256_add_epi16)
LOWBIT_INTEGERS(mm512_add_epi32, _mm256_add_epi32)
LOWBIT_INTEGERS(mm512_sub_epi8, _mm256_sub_epi8)
LOWBIT_INTEGERS(mm512_sub_epi32, _mm256_sub_epi32)
LOWBIT_INTEGERS(mm512_mullo_epi32, _mm256_mullo_epi32)
LOWBIT_INTEGERS(mm512_max_epi32, _mm256_max_epi32)
LOWBIT_INTEGERS(mm512_max_epu16, _mm256_max_epu16)
LOWBIT_INTEGERS(mm512_and_si512, _mm256_and_si256)
LOWBIT_INTEGERS(mm512_or_si512, _mm256_or_si256)
LOWBIT_INTEGERS(mm512_xor_si512, _mm256_xor_si256)
LOWBIT_INTEGERS(mm512_andnot_si512, _mm256_andnot_si256)
LOWBIT_INTEGERS(mm512_srlv_epi32, _mm256_srlv_epi32)
LOWBIT_INTEGERS(mm512_sllv_epi32, _mm256_sllv_epi32)
// These stay within 128 bits in both widths.
LOWBIT_INTEGERS(mm512_unpacklo_epi8, _mm256_unpacklo_epi8)
LOWBIT_INTEGERS(mm512_unpackhi_epi8, _mm256_unpackhi_epi8)
LOWBIT_INTEGERS(mm512_unpacklo_epi32, _mm256_unpacklo_epi32)
LOWBIT_INTEGERS(mm512_unpackhi_epi32, _mm256_unpackhi_epi32)
LOWBIT_INTEGERS(mm512_unpacklo_epi64, _mm256_unpacklo_epi64)
LOWBIT_INTEGERS(mm512_unpackhi_epi64, _mm256_unpackhi_epi64)
LOWBIT_INTEGERS(mm512_packs_epi32, _mm256_packs_epi32)
LOWBIT_INTEGERS(mm512_packus_epi16, _mm256_packus_epi16)
LOWBIT_INTEGERS(mm512_shuffle_epi8, _mm256_shuffle_epi8)
#undef LOWBIT_INTEGERS
#define LOWBIT_SHIFT(name, of_half)                                                                                  \
    LOWBIT_EMULATED __m512i name(__m512i a, int count) {                                                             \
        return join(of_half(mm512_extracti64x4_epi64(a, 0), count), of_half(mm512_extracti64x4_epi64(a, 1), count)); \
    }
LOWBIT_SHIFT(mm512_slli_epi32, _mm256_slli_epi32)
LOWBIT_SHIFT(mm512_srli_epi32, _mm256_srli_epi32)
LOWBIT_SHIFT(mm512_srai_epi32, _mm256_srai_epi32)
LOWBIT_SHIFT(mm512_slli_epi16, _mm256_slli_epi16)
LOWBIT_SHIFT(mm512_srli_epi16, _mm256_srli_epi16)
LOWBIT_SHIFT(mm512_srai_epi16, _mm256_srai_epi16)
#undef LOWBIT_SHIFT
LOWBIT_EMULATED __m512 mm512_abs_ps(__m512 a) { return (__m512)mm512_and_si512((__m512i)a, mm512_set1_epi32(0x7fffffff)); }
LOWBIT_EMULATED __m512i mm512_abs_epi8(__m512i a) {
    return join(_mm256_abs_epi8(mm512_extracti64x4_epi64(a, 0)), _mm256_abs_epi8(mm512_extracti64x4_epi64(a, 1)));
}
LOWBIT_EMULATED_CALL __m512i mm512_sllv_epi16(__m512i a, __m512i counts) {
    Uint16s result = a;
    const Uint16s by = counts;
    for (int i = 0; i < 32; ++i) result[i] = static_cast<uint16_t>(by[i] > 15 ? 0 : result[i] << by[i]);
    return result;
}
LOWBIT_EMULATED_CALL __m512i mm512_srlv_epi16(__m512i a, __m512i counts) {
    Uint16s result = a;
    const Uint16s by = counts;
    for (int i = 0; i < 32; ++i) result[i] = static_cast<uint16_t>(by[i] > 15 ? 0 : result[i] >> by[i]);
    return result;
}
LOWBIT_EMULATED_CALL __m512i mm512_rorv_epi32(__m512i a, __m512i counts) {
    Uint32s result = a;
    const Uint32s by = counts;
    for (int i = 0; i < 16; ++i) result[i] = result[i] >> (by[i] & 31) | result[i] << (-by[i] & 31);
    return result;
}
// Bit 4 a + 2 b + c of `table` for the bits of each place.
LOWBIT_EMULATED_CALL __m512i mm512_ternarylogic_epi32(__m512i a, __m512i b, __m512i c, int table) {
    const Uint64s x = a, y = b, z = c;
    Uint64s result;
    for (int i = 0; i < 8; ++i) {
        result[i] = 0;
        for (int place = 0; place < 8; ++place) {
            if (!(table >> place & 1)) continue;
            result[i] |= (place & 4 ? x[i] : ~x[i]) & (place & 2 ? y[i] : ~y[i]) & (place & 1 ? z[i] : ~z[i]);
        }
    }
    return result;
}
LOWBIT_EMULATED __m512i mm512_ternarylogic_epi64(__m512i a, __m512i b, __m512i c, int table) {
    return mm512_ternarylogic_epi32(a, b, c, table);
}
LOWBIT_EMULATED_CALL __m512i mm512_multishift_epi64_epi8(__m512i counts, __m512i a) {
    const Uint64s words = a;
    Uint8s result = counts;
    for (int i = 0; i < 64; ++i) {
        const int by = result[i] & 63;
        const uint64_t word = words[i / 8];
        result[i] = static_cast<uint8_t>(by ? word >> by | word << (64 - by) : word);
    }
    return result;
}

// Conversions.
LOWBIT_EMULATED __m512i mm512_cvtepu8_epi32(__m128i a) {
    return join(_mm256_cvtepu8_epi32(a), _mm256_cvtepu8_epi32(_mm_srli_si128(a, 8)));
}
LOWBIT_EMULATED __m512i mm512_cvtepi8_epi32(__m128i a) {
    return join(_mm256_cvtepi8_epi32(a), _mm256_cvtepi8_epi32(_mm_srli_si128(a, 8)));
}
LOWBIT_EMULATED __m512i mm512_cvtepu16_epi32(__m256i a) {
    return join(_mm256_cvtepu16_epi32(_mm256_castsi256_si128(a)), _mm256_cvtepu16_epi32(_mm256_extracti128_si256(a, 1)));
}
LOWBIT_EMULATED __m512i mm512_cvtepi16_epi32(__m256i a) {
    return join(_mm256_cvtepi16_epi32(_mm256_castsi256_si128(a)), _mm256_cvtepi16_epi32(_mm256_extracti128_si256(a, 1)));
}
LOWBIT_EMULATED __m512i mm512_cvtepi8_epi16(__m256i a) {
    return join(_mm256_cvtepi8_epi16(_mm256_castsi256_si128(a)), _mm256_cvtepi8_epi16(_mm256_extracti128_si256(a, 1)));
}
LOWBIT_EMULATED __m512i mm512_cvtepu8_epi16(__m256i a) {
    return join(_mm256_cvtepu8_epi16(_mm256_castsi256_si128(a)), _mm256_cvtepu8_epi16(_mm256_extracti128_si256(a, 1)));
}
LOWBIT_EMULATED_CALL __m128i mm512_cvtepi32_epi8(__m512i a) {
    const Uint32s from = a;
    Lanes<uint8_t, __m128i> to;
    for (int i = 0; i < 16; ++i) to[i] = static_cast<uint8_t>(from[i]);
    return to;
}
LOWBIT_EMULATED_CALL __m256i mm512_cvtepi32_epi16(__m512i a) {
    const Uint32s from = a;
    Lanes<uint16_t, __m256i> to;
    for (int i = 0; i < 16; ++i) to[i] = static_cast<uint16_t>(from[i]);
    return to;
}
LOWBIT_EMULATED_CALL __m256i mm512_cvtepi16_epi8(__m512i a) {
    const Uint16s from = a;
    Lanes<uint8_t, __m256i> to;
    for (int i = 0; i < 32; ++i) to[i] = static_cast<uint8_t>(from[i]);
    return to;
}
LOWBIT_EMULATED void mm512_mask_cvtepi32_storeu_epi8(void* to, __mmask16 mask, __m512i a) {
    masked_store<uint8_t>(to, mask, mm512_cvtepi32_epi8(a));
}
LOWBIT_EMULATED __m512 mm512_cvtepi32_ps(__m512i a) {
    return join(_mm256_cvtepi32_ps(mm512_extracti64x4_epi64(a, 0)), _mm256_cvtepi32_ps(mm512_extracti64x4_epi64(a, 1)));
}
LOWBIT_EMULATED __m512i mm512_cvtps_epi32(__m512 a) {
    return join(_mm256_cvtps_epi32(half_of(a, 0)), _mm256_cvtps_epi32(half_of(a, 1)));
}
LOWBIT_EMULATED __m512 mm512_cvtph_ps(__m256i a) {
    return join(_mm256_cvtph_ps(_mm256_castsi256_si128(a)), _mm256_cvtph_ps(_mm256_extracti128_si256(a, 1)));
}
LOWBIT_EMULATED __m256i mm512_cvtps_ph(__m512 a, int) {  // to nearest, as all uses ask
    return _mm256_set_m128i(_mm256_cvtps_ph(half_of(a, 1), _MM_FROUND_TO_NEAREST_INT),
                            _mm256_cvtps_ph(half_of(a, 0), _MM_FROUND_TO_NEAREST_INT));
}
LOWBIT_EMULATED uint16_t bfloat16_of(float value) {
    const uint32_t bits = bits_of(value), magnitude = bits & 0x7fffffffu;
    if (magnitude < 0x00800000u) return static_cast<uint16_t>(bits >> 16 & 0x8000u);
    if (magnitude > 0x7f800000u) return static_cast<uint16_t>(bits >> 16 | 0x40u);
    return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}
LOWBIT_EMULATED_CALL __m512bh mm512_cvtne2ps_pbh(__m512 high, __m512 low) {
    const Floats upper = high, lower = low;
    Lanes<uint16_t, __m512bh> to;
    for (int i = 0; i < 16; ++i) to[i] = bfloat16_of(lower[i]), to[16 + i] = bfloat16_of(upper[i]);
    return to;
}
LOWBIT_EMULATED_CALL __m512 mm512_roundscale_ps(__m512 a, int) {  // to the nearest integer, as all uses ask
    return join(_mm256_round_ps(half_of(a, 0), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC),
                _mm256_round_ps(half_of(a, 1), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
// a - floor(a), as all uses ask; of infinity zero.
LOWBIT_EMULATED_CALL __m512 mm512_reduce_ps(__m512 a, int) {
    Floats result = a;
    for (int i = 0; i < 16; ++i) result[i] = std::isinf(result[i]) ? 0.0f : result[i] - std::floor(result[i]);
    return result;
}
// a times 2 to the power of floor(b).
LOWBIT_EMULATED_CALL __m512 mm512_scalef_ps(__m512 a, __m512 b) {
    Floats result = a;
    const Floats powers = b;
    for (int i = 0; i < 16; ++i) {
        const float power = std::floor(powers[i]);
        if (std::isnan(power)) result[i] = power;
        else if (std::isinf(power)) result[i] *= power > 0 ? power : 0.0f;
        else result[i] = std::scalbn(result[i], power > 1000.0f ? 1000 : power < -1000.0f ? -1000 : static_cast<int>(power));
    }
    return result;
}

// Masks.
template <typename T, typename Test>
LOWBIT_EMULATED uint64_t mask_where(__m512i a, __m512i b, Test test) {
    const Lanes<T, __m512i> x = a, y = b;
    uint64_t mask = 0;
    for (int i = 0; i < x.count; ++i) mask |= static_cast<uint64_t>(test(x[i], y[i])) << i;
    return mask;
}
#define LOWBIT_TEST(name, Mask, T, test)                                                                             \
    LOWBIT_EMULATED_CALL Mask name(__m512i a, __m512i b) {                                                           \
        return static_cast<Mask>(mask_where<T>(a, b, [](T x, T y) __attribute__((always_inline)) { return test; })); \
    }
LOWBIT_TEST(mm512_cmpeq_epi8_mask, __mmask64, uint8_t, x == y)
LOWBIT_TEST(mm512_cmpeq_epi16_mask, __mmask32, uint16_t, x == y)
LOWBIT_TEST(mm512_cmpeq_epi32_mask, __mmask16, uint32_t, x == y)
LOWBIT_TEST(mm512_cmpge_epu8_mask, __mmask64, uint8_t, x >= y)
LOWBIT_TEST(mm512_test_epi16_mask, __mmask32, uint16_t, (x & y) != 0)
LOWBIT_TEST(mm512_testn_epi16_mask, __mmask32, uint16_t, (x & y) == 0)
LOWBIT_TEST(mm512_testn_epi32_mask, __mmask16, uint32_t, (x & y) == 0)
#undef LOWBIT_TEST
LOWBIT_EMULATED __mmask32 mm256_cmpeq_epi8_mask(__m256i a, __m256i b) {
    return static_cast<__mmask32>(_mm256_movemask_epi8(_mm256_cmpeq_epi8(a, b)));
}
LOWBIT_EMULATED_CALL __mmask16 mm512_cmp_ps_mask(__m512 a, __m512 b, int predicate) {
    const Floats x = a, y = b;
    unsigned mask = 0;
    for (int i = 0; i < 16; ++i) {
        bool is_true;
        switch (predicate) {
            case _CMP_GT_OQ: is_true = x[i] > y[i]; break;
            case _CMP_LT_OQ: is_true = x[i] < y[i]; break;
            case _CMP_NEQ_UQ: is_true = !(x[i] == y[i]); break;
            case _CMP_UNORD_Q: is_true = std::isnan(x[i]) || std::isnan(y[i]); break;
            default: __builtin_trap();
        }
        mask |= static_cast<unsigned>(is_true) << i;
    }
    return static_cast<__mmask16>(mask);
}
template <typename T>
LOWBIT_EMULATED_CALL __m512i choose(__m512i otherwise, uint64_t mask, __m512i value) {
    Lanes<T, __m512i> result = otherwise;
    const Lanes<T, __m512i> chosen = value;
    for (int i = 0; i < result.count; ++i)
        if (mask >> i & 1) result[i] = chosen[i];
    return result;
}
LOWBIT_EMULATED __m512 mm512_mask_mov_ps(__m512 otherwise, __mmask16 mask, __m512 a) {
    return (__m512)choose<uint32_t>((__m512i)otherwise, mask, (__m512i)a);
}
LOWBIT_EMULATED __m512 mm512_maskz_mov_ps(__mmask16 mask, __m512 a) { return mm512_mask_mov_ps(mm512_setzero_ps(), mask, a); }
LOWBIT_EMULATED __m512i mm512_mask_mov_epi8(__m512i otherwise, __mmask64 mask, __m512i a) {
    return choose<uint8_t>(otherwise, mask, a);
}
LOWBIT_EMULATED __m512i mm512_mask_mov_epi16(__m512i otherwise, __mmask32 mask, __m512i a) {
    return choose<uint16_t>(otherwise, mask, a);
}
LOWBIT_EMULATED __m512i mm512_mask_mov_epi32(__m512i otherwise, __mmask16 mask, __m512i a) {
    return choose<uint32_t>(otherwise, mask, a);
}
LOWBIT_EMULATED __m512i mm512_mask_blend_epi16(__mmask32 mask, __m512i a, __m512i b) { return choose<uint16_t>(a, mask, b); }
LOWBIT_EMULATED __m512i mm512_mask_add_epi8(__m512i otherwise, __mmask64 mask, __m512i a, __m512i b) {
    return choose<uint8_t>(otherwise, mask, mm512_add_epi8(a, b));
}
LOWBIT_EMULATED __m512i mm512_mask_add_epi16(__m512i otherwise, __mmask32 mask, __m512i a, __m512i b) {
    return choose<uint16_t>(otherwise, mask, mm512_add_epi16(a, b));
}
LOWBIT_EMULATED __m512i mm512_mask_broadcast_i64x4(__m512i otherwise, __mmask8 mask, __m256i a) {
    return choose<uint64_t>(otherwise, mask, mm512_broadcast_i64x4(a));
}
LOWBIT_EMULATED __m512 mm512_mask_broadcastss_ps(__m512 otherwise, __mmask16 mask, __m128 a) {
    return mm512_mask_mov_ps(otherwise, mask, mm512_set1_ps(_mm_cvtss_f32(a)));
}

// Permutations.
template <typename T>
LOWBIT_EMULATED_CALL __m512i permute(__m512i indices, __m512i a) {
    const Lanes<T, __m512i> from = a;
    Lanes<T, __m512i> result = indices;
    for (int i = 0; i < result.count; ++i) result[i] = from[static_cast<int>(result[i] & (result.count - 1))];
    return result;
}
template <typename T>
LOWBIT_EMULATED_CALL __m512i permute_two(__m512i a, __m512i indices, __m512i b) {
    const Lanes<T, __m512i> first = a, second = b;
    Lanes<T, __m512i> result = indices;
    for (int i = 0; i < result.count; ++i) {
        const int index = static_cast<int>(result[i] & (2 * result.count - 1));
        result[i] = index < result.count ? first[index] : second[index - result.count];
    }
    return result;
}
LOWBIT_EMULATED __m512 mm512_permutexvar_ps(__m512i indices, __m512 a) { return (__m512)permute<uint32_t>(indices, (__m512i)a); }
LOWBIT_EMULATED __m512i mm512_permutexvar_epi8(__m512i indices, __m512i a) { return permute<uint8_t>(indices, a); }
LOWBIT_EMULATED __m512i mm512_permutexvar_epi16(__m512i indices, __m512i a) { return permute<uint16_t>(indices, a); }
LOWBIT_EMULATED __m512i mm512_permutexvar_epi64(__m512i indices, __m512i a) { return permute<uint64_t>(indices, a); }
LOWBIT_EMULATED __m512 mm512_mask_permutexvar_ps(__m512 otherwise, __mmask16 mask, __m512i indices, __m512 a) {
    return mm512_mask_mov_ps(otherwise, mask, mm512_permutexvar_ps(indices, a));
}
LOWBIT_EMULATED __m512i mm512_mask_permutexvar_epi8(__m512i otherwise, __mmask64 mask, __m512i indices, __m512i a) {
    return choose<uint8_t>(otherwise, mask, permute<uint8_t>(indices, a));
}
LOWBIT_EMULATED __m512 mm512_permutex2var_ps(__m512 a, __m512i indices, __m512 b) {
    return (__m512)permute_two<uint32_t>((__m512i)a, indices, (__m512i)b);
}
LOWBIT_EMULATED __m512i mm512_permutex2var_epi8(__m512i a, __m512i indices, __m512i b) {
    return permute_two<uint8_t>(a, indices, b);
}
LOWBIT_EMULATED __m512i mm512_permutex2var_epi16(__m512i a, __m512i indices, __m512i b) {
    return permute_two<uint16_t>(a, indices, b);
}
LOWBIT_EMULATED __m512i mm512_permutex2var_epi32(__m512i a, __m512i indices, __m512i b) {
    return permute_two<uint32_t>(a, indices, b);
}
LOWBIT_EMULATED __m512i mm512_permutex2var_epi64(__m512i a, __m512i indices, __m512i b) {
    return permute_two<uint64_t>(a, indices, b);
}
// Two quarters of `a`, then two of `b`.
LOWBIT_EMULATED_CALL __m512i mm512_shuffle_i32x4(__m512i a, __m512i b, int places) {
    __m512i result;
    for (int i = 0; i < 4; ++i)
        std::memcpy(reinterpret_cast<char*>(&result) + 16 * i,
                    reinterpret_cast<const char*>(i < 2 ? &a : &b) + 16 * (places >> (2 * i) & 3), 16);
    return result;
}
LOWBIT_EMULATED __m512 mm512_shuffle_f32x4(__m512 a, __m512 b, int places) {
    return (__m512)mm512_shuffle_i32x4((__m512i)a, (__m512i)b, places);
}
// Within each 128 bits.
LOWBIT_EMULATED_CALL __m512 mm512_permute_ps(__m512 a, int places) {
    const Floats from = a;
    Floats result;
    for (int i = 0; i < 16; ++i) result[i] = from[i / 4 * 4 + (places >> (2 * (i % 4)) & 3)];
    return result;
}
LOWBIT_EMULATED __m512 mm512_moveldup_ps(__m512 a) { return mm512_permute_ps(a, 0xa0); }
LOWBIT_EMULATED __m512 mm512_movehdup_ps(__m512 a) { return mm512_permute_ps(a, 0xf5); }

// Reductions, in the order of GCC's.
template <typename T, typename Register, typename Op>
LOWBIT_EMULATED T reduce(Register a, Op op) {
    Lanes<T, Register> x = a;
    for (int i = 0; i < 8; ++i) x[i] = op(x[8 + i], x[i]);
    for (int i = 0; i < 4; ++i) x[i] = op(x[4 + i], x[i]);
    const T low = op(x[0], x[2]), high = op(x[1], x[3]);
    return op(low, high);
}
LOWBIT_EMULATED_CALL float mm512_reduce_add_ps(__m512 a) {
    return reduce<float>(a, [](float x, float y) { return x + y; });
}
LOWBIT_EMULATED_CALL int mm512_reduce_add_epi32(__m512i a) {
    return static_cast<int>(reduce<uint32_t>(a, [](uint32_t x, uint32_t y) { return x + y; }));
}
LOWBIT_EMULATED_CALL float mm512_reduce_max_ps(__m512 a) {
    return reduce<float>(a, [](float x, float y) { return x > y ? x : y; });
}

// Dot products.
LOWBIT_EMULATED_CALL __m512i mm512_dpbusd_epi32(__m512i sums, __m512i a, __m512i b) {
    Uint32s result = sums;
    const Uint8s x = a;
    const Int8s y = b;
    for (int i = 0; i < 16; ++i)
        for (int j = 4 * i; j < 4 * i + 4; ++j) result[i] += static_cast<uint32_t>(x[j] * y[j]);
    return result;
}
LOWBIT_EMULATED_CALL __m512i mm512_dpwssd_epi32(__m512i sums, __m512i a, __m512i b) {
    Uint32s result = sums;
    const Int16s x = a, y = b;
    for (int i = 0; i < 16; ++i)
        for (int j = 2 * i; j < 2 * i + 2; ++j) result[i] += static_cast<uint32_t>(x[j] * y[j]);
    return result;
}

LOWBIT_EMULATED float without_subnormal(float value) {
    const uint32_t bits = bits_of(value);
    return bits & 0x7f800000u ? value : float_of(bits & 0x80000000u);
}
LOWBIT_EMULATED float wide_bfloat16(uint16_t bits) { return without_subnormal(float_of(static_cast<uint32_t>(bits) << 16)); }
// a * b + c rounded once; subnormal numbers are zero before and after.
LOWBIT_EMULATED float flushing_fma(float a, float b, float c) {
    return without_subnormal(__builtin_fmaf(a, b, without_subnormal(c)));
}
// The odd elements are added first.
LOWBIT_EMULATED_CALL __m512 mm512_dpbf16_ps(__m512 sums, __m512bh a, __m512bh b) {
    Floats result = sums;
    const Lanes<uint16_t, __m512bh> x = a, y = b;
    for (int i = 0; i < 16; ++i) {
        const float odd = flushing_fma(wide_bfloat16(x[2 * i + 1]), wide_bfloat16(y[2 * i + 1]), result[i]);
        result[i] = flushing_fma(wide_bfloat16(x[2 * i]), wide_bfloat16(y[2 * i]), odd);
    }
    return result;
}

}  // namespace emulation
}  // namespace lowbit

#pragma GCC pop_options

// The intrinsics' names, from here on.
#undef _mm256_cmpeq_epi8_mask
#define _mm256_cmpeq_epi8_mask ::lowbit::emulation::mm256_cmpeq_epi8_mask
#undef _mm256_mask_storeu_epi16
#define _mm256_mask_storeu_epi16 ::lowbit::emulation::mm256_mask_storeu_epi16
#undef _mm256_maskz_loadu_epi16
#define _mm256_maskz_loadu_epi16 ::lowbit::emulation::mm256_maskz_loadu_epi16
#undef _mm256_maskz_loadu_epi8
#define _mm256_maskz_loadu_epi8 ::lowbit::emulation::mm256_maskz_loadu_epi8
#undef _mm512_abs_epi8
#define _mm512_abs_epi8 ::lowbit::emulation::mm512_abs_epi8
#undef _mm512_abs_ps
#define _mm512_abs_ps ::lowbit::emulation::mm512_abs_ps
#undef _mm512_add_epi16
#define _mm512_add_epi16 ::lowbit::emulation::mm512_add_epi16
#undef _mm512_add_epi32
#define _mm512_add_epi32 ::lowbit::emulation::mm512_add_epi32
#undef _mm512_add_epi8
#define _mm512_add_epi8 ::lowbit::emulation::mm512_add_epi8
#undef _mm512_add_ps
#define _mm512_add_ps ::lowbit::emulation::mm512_add_ps
#undef _mm512_and_si512
#define _mm512_and_si512 ::lowbit::emulation::mm512_and_si512
#undef _mm512_andnot_si512
#define _mm512_andnot_si512 ::lowbit::emulation::mm512_andnot_si512
#undef _mm512_broadcast_f32x4
#define _mm512_broadcast_f32x4 ::lowbit::emulation::mm512_broadcast_f32x4
#undef _mm512_broadcast_f32x8
#define _mm512_broadcast_f32x8 ::lowbit::emulation::mm512_broadcast_f32x8
#undef _mm512_broadcast_i32x4
#define _mm512_broadcast_i32x4 ::lowbit::emulation::mm512_broadcast_i32x4
#undef _mm512_broadcast_i64x4
#define _mm512_broadcast_i64x4 ::lowbit::emulation::mm512_broadcast_i64x4
#undef _mm512_castps256_ps512
#define _mm512_castps256_ps512 ::lowbit::emulation::mm512_castps256_ps512
#undef _mm512_castps_si512
#define _mm512_castps_si512 ::lowbit::emulation::mm512_castps_si512
#undef _mm512_castsi128_si512
#define _mm512_castsi128_si512 ::lowbit::emulation::mm512_castsi128_si512
#undef _mm512_castsi256_si512
#define _mm512_castsi256_si512 ::lowbit::emulation::mm512_castsi256_si512
#undef _mm512_castsi512_ps
#define _mm512_castsi512_ps ::lowbit::emulation::mm512_castsi512_ps
#undef _mm512_castsi512_si256
#define _mm512_castsi512_si256 ::lowbit::emulation::mm512_castsi512_si256
#undef _mm512_cmp_ps_mask
#define _mm512_cmp_ps_mask ::lowbit::emulation::mm512_cmp_ps_mask
#undef _mm512_cmpeq_epi16_mask
#define _mm512_cmpeq_epi16_mask ::lowbit::emulation::mm512_cmpeq_epi16_mask
#undef _mm512_cmpeq_epi32_mask
#define _mm512_cmpeq_epi32_mask ::lowbit::emulation::mm512_cmpeq_epi32_mask
#undef _mm512_cmpeq_epi8_mask
#define _mm512_cmpeq_epi8_mask ::lowbit::emulation::mm512_cmpeq_epi8_mask
#undef _mm512_cmpge_epu8_mask
#define _mm512_cmpge_epu8_mask ::lowbit::emulation::mm512_cmpge_epu8_mask
#undef _mm512_cvtepi16_epi32
#define _mm512_cvtepi16_epi32 ::lowbit::emulation::mm512_cvtepi16_epi32
#undef _mm512_cvtepi16_epi8
#define _mm512_cvtepi16_epi8 ::lowbit::emulation::mm512_cvtepi16_epi8
#undef _mm512_cvtepi32_epi16
#define _mm512_cvtepi32_epi16 ::lowbit::emulation::mm512_cvtepi32_epi16
#undef _mm512_cvtepi32_epi8
#define _mm512_cvtepi32_epi8 ::lowbit::emulation::mm512_cvtepi32_epi8
#undef _mm512_cvtepi32_ps
#define _mm512_cvtepi32_ps ::lowbit::emulation::mm512_cvtepi32_ps
#undef _mm512_cvtepi8_epi16
#define _mm512_cvtepi8_epi16 ::lowbit::emulation::mm512_cvtepi8_epi16
#undef _mm512_cvtepi8_epi32
#define _mm512_cvtepi8_epi32 ::lowbit::emulation::mm512_cvtepi8_epi32
#undef _mm512_cvtepu16_epi32
#define _mm512_cvtepu16_epi32 ::lowbit::emulation::mm512_cvtepu16_epi32
#undef _mm512_cvtepu8_epi16
#define _mm512_cvtepu8_epi16 ::lowbit::emulation::mm512_cvtepu8_epi16
#undef _mm512_cvtepu8_epi32
#define _mm512_cvtepu8_epi32 ::lowbit::emulation::mm512_cvtepu8_epi32
#undef _mm512_cvtne2ps_pbh
#define _mm512_cvtne2ps_pbh ::lowbit::emulation::mm512_cvtne2ps_pbh
#undef _mm512_cvtph_ps
#define _mm512_cvtph_ps ::lowbit::emulation::mm512_cvtph_ps
#undef _mm512_cvtps_epi32
#define _mm512_cvtps_epi32 ::lowbit::emulation::mm512_cvtps_epi32
#undef _mm512_cvtps_ph
#define _mm512_cvtps_ph ::lowbit::emulation::mm512_cvtps_ph
#undef _mm512_cvtss_f32
#define _mm512_cvtss_f32 ::lowbit::emulation::mm512_cvtss_f32
#undef _mm512_div_ps
#define _mm512_div_ps ::lowbit::emulation::mm512_div_ps
#undef _mm512_dpbf16_ps
#define _mm512_dpbf16_ps ::lowbit::emulation::mm512_dpbf16_ps
#undef _mm512_dpbusd_epi32
#define _mm512_dpbusd_epi32 ::lowbit::emulation::mm512_dpbusd_epi32
#undef _mm512_dpwssd_epi32
#define _mm512_dpwssd_epi32 ::lowbit::emulation::mm512_dpwssd_epi32
#undef _mm512_extracti64x4_epi64
#define _mm512_extracti64x4_epi64 ::lowbit::emulation::mm512_extracti64x4_epi64
#undef _mm512_fmadd_ps
#define _mm512_fmadd_ps ::lowbit::emulation::mm512_fmadd_ps
#undef _mm512_fmaddsub_ps
#define _mm512_fmaddsub_ps ::lowbit::emulation::mm512_fmaddsub_ps
#undef _mm512_fmsub_ps
#define _mm512_fmsub_ps ::lowbit::emulation::mm512_fmsub_ps
#undef _mm512_fnmadd_ps
#define _mm512_fnmadd_ps ::lowbit::emulation::mm512_fnmadd_ps
#undef _mm512_inserti32x4
#define _mm512_inserti32x4 ::lowbit::emulation::mm512_inserti32x4
#undef _mm512_inserti64x4
#define _mm512_inserti64x4 ::lowbit::emulation::mm512_inserti64x4
#undef _mm512_load_ps
#define _mm512_load_ps ::lowbit::emulation::mm512_load_ps
#undef _mm512_load_si512
#define _mm512_load_si512 ::lowbit::emulation::mm512_load_si512
#undef _mm512_loadu_ps
#define _mm512_loadu_ps ::lowbit::emulation::mm512_loadu_ps
#undef _mm512_loadu_si512
#define _mm512_loadu_si512 ::lowbit::emulation::mm512_loadu_si512
#undef _mm512_mask_add_epi16
#define _mm512_mask_add_epi16 ::lowbit::emulation::mm512_mask_add_epi16
#undef _mm512_mask_add_epi8
#define _mm512_mask_add_epi8 ::lowbit::emulation::mm512_mask_add_epi8
#undef _mm512_mask_blend_epi16
#define _mm512_mask_blend_epi16 ::lowbit::emulation::mm512_mask_blend_epi16
#undef _mm512_mask_broadcast_i64x4
#define _mm512_mask_broadcast_i64x4 ::lowbit::emulation::mm512_mask_broadcast_i64x4
#undef _mm512_mask_broadcastss_ps
#define _mm512_mask_broadcastss_ps ::lowbit::emulation::mm512_mask_broadcastss_ps
#undef _mm512_mask_cvtepi32_storeu_epi8
#define _mm512_mask_cvtepi32_storeu_epi8 ::lowbit::emulation::mm512_mask_cvtepi32_storeu_epi8
#undef _mm512_mask_mov_epi16
#define _mm512_mask_mov_epi16 ::lowbit::emulation::mm512_mask_mov_epi16
#undef _mm512_mask_mov_epi32
#define _mm512_mask_mov_epi32 ::lowbit::emulation::mm512_mask_mov_epi32
#undef _mm512_mask_mov_epi8
#define _mm512_mask_mov_epi8 ::lowbit::emulation::mm512_mask_mov_epi8
#undef _mm512_mask_mov_ps
#define _mm512_mask_mov_ps ::lowbit::emulation::mm512_mask_mov_ps
#undef _mm512_mask_permutexvar_epi8
#define _mm512_mask_permutexvar_epi8 ::lowbit::emulation::mm512_mask_permutexvar_epi8
#undef _mm512_mask_permutexvar_ps
#define _mm512_mask_permutexvar_ps ::lowbit::emulation::mm512_mask_permutexvar_ps
#undef _mm512_mask_storeu_epi32
#define _mm512_mask_storeu_epi32 ::lowbit::emulation::mm512_mask_storeu_epi32
#undef _mm512_mask_storeu_ps
#define _mm512_mask_storeu_ps ::lowbit::emulation::mm512_mask_storeu_ps
#undef _mm512_maskz_loadu_epi16
#define _mm512_maskz_loadu_epi16 ::lowbit::emulation::mm512_maskz_loadu_epi16
#undef _mm512_maskz_loadu_epi8
#define _mm512_maskz_loadu_epi8 ::lowbit::emulation::mm512_maskz_loadu_epi8
#undef _mm512_maskz_loadu_ps
#define _mm512_maskz_loadu_ps ::lowbit::emulation::mm512_maskz_loadu_ps
#undef _mm512_maskz_mov_ps
#define _mm512_maskz_mov_ps ::lowbit::emulation::mm512_maskz_mov_ps
#undef _mm512_max_epi32
#define _mm512_max_epi32 ::lowbit::emulation::mm512_max_epi32
#undef _mm512_max_epu16
#define _mm512_max_epu16 ::lowbit::emulation::mm512_max_epu16
#undef _mm512_max_ps
#define _mm512_max_ps ::lowbit::emulation::mm512_max_ps
#undef _mm512_min_ps
#define _mm512_min_ps ::lowbit::emulation::mm512_min_ps
#undef _mm512_movehdup_ps
#define _mm512_movehdup_ps ::lowbit::emulation::mm512_movehdup_ps
#undef _mm512_moveldup_ps
#define _mm512_moveldup_ps ::lowbit::emulation::mm512_moveldup_ps
#undef _mm512_mul_ps
#define _mm512_mul_ps ::lowbit::emulation::mm512_mul_ps
#undef _mm512_mullo_epi32
#define _mm512_mullo_epi32 ::lowbit::emulation::mm512_mullo_epi32
#undef _mm512_multishift_epi64_epi8
#define _mm512_multishift_epi64_epi8 ::lowbit::emulation::mm512_multishift_epi64_epi8
#undef _mm512_or_si512
#define _mm512_or_si512 ::lowbit::emulation::mm512_or_si512
#undef _mm512_packs_epi32
#define _mm512_packs_epi32 ::lowbit::emulation::mm512_packs_epi32
#undef _mm512_packus_epi16
#define _mm512_packus_epi16 ::lowbit::emulation::mm512_packus_epi16
#undef _mm512_permute_ps
#define _mm512_permute_ps ::lowbit::emulation::mm512_permute_ps
#undef _mm512_permutex2var_epi16
#define _mm512_permutex2var_epi16 ::lowbit::emulation::mm512_permutex2var_epi16
#undef _mm512_permutex2var_epi32
#define _mm512_permutex2var_epi32 ::lowbit::emulation::mm512_permutex2var_epi32
#undef _mm512_permutex2var_epi64
#define _mm512_permutex2var_epi64 ::lowbit::emulation::mm512_permutex2var_epi64
#undef _mm512_permutex2var_epi8
#define _mm512_permutex2var_epi8 ::lowbit::emulation::mm512_permutex2var_epi8
#undef _mm512_permutex2var_ps
#define _mm512_permutex2var_ps ::lowbit::emulation::mm512_permutex2var_ps
#undef _mm512_permutexvar_epi16
#define _mm512_permutexvar_epi16 ::lowbit::emulation::mm512_permutexvar_epi16
#undef _mm512_permutexvar_epi64
#define _mm512_permutexvar_epi64 ::lowbit::emulation::mm512_permutexvar_epi64
#undef _mm512_permutexvar_epi8
#define _mm512_permutexvar_epi8 ::lowbit::emulation::mm512_permutexvar_epi8
#undef _mm512_permutexvar_ps
#define _mm512_permutexvar_ps ::lowbit::emulation::mm512_permutexvar_ps
#undef _mm512_reduce_add_epi32
#define _mm512_reduce_add_epi32 ::lowbit::emulation::mm512_reduce_add_epi32
#undef _mm512_reduce_add_ps
#define _mm512_reduce_add_ps ::lowbit::emulation::mm512_reduce_add_ps
#undef _mm512_reduce_max_ps
#define _mm512_reduce_max_ps ::lowbit::emulation::mm512_reduce_max_ps
#undef _mm512_reduce_ps
#define _mm512_reduce_ps ::lowbit::emulation::mm512_reduce_ps
#undef _mm512_rorv_epi32
#define _mm512_rorv_epi32 ::lowbit::emulation::mm512_rorv_epi32
#undef _mm512_roundscale_ps
#define _mm512_roundscale_ps ::lowbit::emulation::mm512_roundscale_ps
#undef _mm512_scalef_ps
#define _mm512_scalef_ps ::lowbit::emulation::mm512_scalef_ps
#undef _mm512_set1_epi16
#define _mm512_set1_epi16 ::lowbit::emulation::mm512_set1_epi16
#undef _mm512_set1_epi32
#define _mm512_set1_epi32 ::lowbit::emulation::mm512_set1_epi32
#undef _mm512_set1_epi64
#define _mm512_set1_epi64 ::lowbit::emulation::mm512_set1_epi64
#undef _mm512_set1_epi8
#define _mm512_set1_epi8 ::lowbit::emulation::mm512_set1_epi8
#undef _mm512_set1_ps
#define _mm512_set1_ps ::lowbit::emulation::mm512_set1_ps
#undef _mm512_set4_epi32
#define _mm512_set4_epi32 ::lowbit::emulation::mm512_set4_epi32
#undef _mm512_set_epi64
#define _mm512_set_epi64 ::lowbit::emulation::mm512_set_epi64
#undef _mm512_set_ps
#define _mm512_set_ps ::lowbit::emulation::mm512_set_ps
#undef _mm512_setr_epi32
#define _mm512_setr_epi32 ::lowbit::emulation::mm512_setr_epi32
#undef _mm512_setr_epi64
#define _mm512_setr_epi64 ::lowbit::emulation::mm512_setr_epi64
#undef _mm512_setr_ps
#define _mm512_setr_ps ::lowbit::emulation::mm512_setr_ps
#undef _mm512_setzero_ps
#define _mm512_setzero_ps ::lowbit::emulation::mm512_setzero_ps
#undef _mm512_setzero_si512
#define _mm512_setzero_si512 ::lowbit::emulation::mm512_setzero_si512
#undef _mm512_shuffle_epi8
#define _mm512_shuffle_epi8 ::lowbit::emulation::mm512_shuffle_epi8
#undef _mm512_shuffle_f32x4
#define _mm512_shuffle_f32x4 ::lowbit::emulation::mm512_shuffle_f32x4
#undef _mm512_shuffle_i32x4
#define _mm512_shuffle_i32x4 ::lowbit::emulation::mm512_shuffle_i32x4
#undef _mm512_slli_epi16
#define _mm512_slli_epi16 ::lowbit::emulation::mm512_slli_epi16
#undef _mm512_slli_epi32
#define _mm512_slli_epi32 ::lowbit::emulation::mm512_slli_epi32
#undef _mm512_sllv_epi16
#define _mm512_sllv_epi16 ::lowbit::emulation::mm512_sllv_epi16
#undef _mm512_sllv_epi32
#define _mm512_sllv_epi32 ::lowbit::emulation::mm512_sllv_epi32
#undef _mm512_srai_epi16
#define _mm512_srai_epi16 ::lowbit::emulation::mm512_srai_epi16
#undef _mm512_srai_epi32
#define _mm512_srai_epi32 ::lowbit::emulation::mm512_srai_epi32
#undef _mm512_srli_epi16
#define _mm512_srli_epi16 ::lowbit::emulation::mm512_srli_epi16
#undef _mm512_srli_epi32
#define _mm512_srli_epi32 ::lowbit::emulation::mm512_srli_epi32
#undef _mm512_srlv_epi16
#define _mm512_srlv_epi16 ::lowbit::emulation::mm512_srlv_epi16
#undef _mm512_srlv_epi32
#define _mm512_srlv_epi32 ::lowbit::emulation::mm512_srlv_epi32
#undef _mm512_store_ps
#define _mm512_store_ps ::lowbit::emulation::mm512_store_ps
#undef _mm512_store_si512
#define _mm512_store_si512 ::lowbit::emulation::mm512_store_si512
#undef _mm512_storeu_ps
#define _mm512_storeu_ps ::lowbit::emulation::mm512_storeu_ps
#undef _mm512_storeu_si512
#define _mm512_storeu_si512 ::lowbit::emulation::mm512_storeu_si512
#undef _mm512_sub_epi32
#define _mm512_sub_epi32 ::lowbit::emulation::mm512_sub_epi32
#undef _mm512_sub_epi8
#define _mm512_sub_epi8 ::lowbit::emulation::mm512_sub_epi8
#undef _mm512_sub_ps
#define _mm512_sub_ps ::lowbit::emulation::mm512_sub_ps
#undef _mm512_ternarylogic_epi32
#define _mm512_ternarylogic_epi32 ::lowbit::emulation::mm512_ternarylogic_epi32
#undef _mm512_ternarylogic_epi64
#define _mm512_ternarylogic_epi64 ::lowbit::emulation::mm512_ternarylogic_epi64
#undef _mm512_test_epi16_mask
#define _mm512_test_epi16_mask ::lowbit::emulation::mm512_test_epi16_mask
#undef _mm512_testn_epi16_mask
#define _mm512_testn_epi16_mask ::lowbit::emulation::mm512_testn_epi16_mask
#undef _mm512_testn_epi32_mask
#define _mm512_testn_epi32_mask ::lowbit::emulation::mm512_testn_epi32_mask
#undef _mm512_unpackhi_epi32
#define _mm512_unpackhi_epi32 ::lowbit::emulation::mm512_unpackhi_epi32
#undef _mm512_unpackhi_epi64
#define _mm512_unpackhi_epi64 ::lowbit::emulation::mm512_unpackhi_epi64
#undef _mm512_unpackhi_epi8
#define _mm512_unpackhi_epi8 ::lowbit::emulation::mm512_unpackhi_epi8
#undef _mm512_unpacklo_epi32
#define _mm512_unpacklo_epi32 ::lowbit::emulation::mm512_unpacklo_epi32
#undef _mm512_unpacklo_epi64
#define _mm512_unpacklo_epi64 ::lowbit::emulation::mm512_unpacklo_epi64
#undef _mm512_unpacklo_epi8
#define _mm512_unpacklo_epi8 ::lowbit::emulation::mm512_unpacklo_epi8
#undef _mm512_xor_si512
#define _mm512_xor_si512 ::lowbit::emulation::mm512_xor_si512
#undef _mm_mask_loadu_epi8
#define _mm_mask_loadu_epi8 ::lowbit::emulation::mm_mask_loadu_epi8
#undef _mm_maskz_loadu_epi8
#define _mm_maskz_loadu_epi8 ::lowbit::emulation::mm_maskz_loadu_epi8

#endif  // LOWBIT_NATIVE_EMULATION_SIMD512_H
