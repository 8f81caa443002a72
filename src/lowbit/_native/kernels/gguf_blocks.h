// The blocks of GGUF files.
//
// Layouts and the order of operations are those of ggml's dequantize_row_*, so that the float32 values are equal bit for
// bit. `decode` takes one block and writes its elements. With 512-bit registers `unpack` takes its place, as what compilers
// make of those loops is several times slower: it hands sixteen elements at a time, with the number of the first, to a
// function that stores or multiplies them.
#ifndef LOWBIT_NATIVE_KERNELS_GGUF_BLOCKS_H
#define LOWBIT_NATIVE_KERNELS_GGUF_BLOCKS_H

#include "quantize.h"

LOWBIT_BEGIN(base)

LOWBIT_INLINE float half_at(const uint8_t* bytes) {
    Half value;
    std::memcpy(&value.bits, bytes, sizeof value.bits);
#ifdef LOWBIT_AVX512
    return _mm512_cvtss_f32(_mm512_cvtph_ps(_mm256_castsi128_si256(_mm_cvtsi32_si128(value.bits))));
#else
    return widen(value);
#endif
}

constexpr float kIq4Values[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};

LOWBIT_INLINE uint32_t word_at(const uint8_t* bytes) {
    uint32_t word;
    std::memcpy(&word, bytes, sizeof word);
    return word;
}

#ifdef LOWBIT_AVX512
LOWBIT_INLINE __m128i load_bytes(const uint8_t* from) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(from)); }

LOWBIT_INLINE __m512i widen_bytes(const uint8_t* from) { return _mm512_cvtepu8_epi32(load_bytes(from)); }

LOWBIT_INLINE __m512 halves_of(const uint8_t* bytes) {
    int16_t bits;
    std::memcpy(&bits, bytes, sizeof bits);
    return _mm512_cvtph_ps(_mm256_set1_epi16(bits));
}

LOWBIT_INLINE __m512 codes_from(float first) {
    const __m512 steps = _mm512_set_ps(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    return _mm512_add_ps(steps, _mm512_set1_ps(first));
}

// 0, step, 2 * step, 3 * step, four times: a table in which two bits of a code count.
LOWBIT_INLINE __m512 two_bit_codes(float step) { return _mm512_broadcast_f32x4(_mm_set_ps(3 * step, 2 * step, step, 0)); }

// The values of sixteen codes, which are the low four bits of each element; what is above them is not looked at.
LOWBIT_INLINE __m512 look_up(__m512 values, __m512i codes) { return _mm512_permutexvar_ps(codes, values); }

// Likewise of five bits.
LOWBIT_INLINE __m512 look_up(__m512 low, __m512 high, __m512i codes) { return _mm512_permutex2var_ps(low, codes, high); }

// Bits of `low` where the mask has them, of `high` elsewhere.
LOWBIT_INLINE __m512i choose_bits(int mask, __m512i low, __m512i high) {
    return _mm512_ternarylogic_epi32(_mm512_set1_epi32(mask), low, high, 0xca);
}

// Bit `from` of each element moved to bit `to`, among others.
LOWBIT_INLINE __m512i move_bit(__m512i bits, int from, int to) {
    return from > to ? _mm512_srli_epi32(bits, from - to) : _mm512_slli_epi32(bits, to - from);
}

// scale * codes - minimum. The products have at most 24 bits and are exact, so that one rounding gives what two would.
LOWBIT_INLINE __m512 scaled(float scale, __m512 codes, float minimum) {
    return _mm512_fmsub_ps(_mm512_set1_ps(scale), codes, _mm512_set1_ps(minimum));
}

// 32 elements in 16 bytes, the first half in the low nibbles.
template <typename Use>
LOWBIT_INLINE void unpack_nibbles(const uint8_t* bytes, __m512 values, int first, Use use) {
    const __m512i codes = widen_bytes(bytes);
    use(first, look_up(values, codes));
    use(first + 16, look_up(values, _mm512_srli_epi32(codes, 4)));
}

// Likewise with the fifth bits in a word; their elements are in the second table.
template <typename Use>
LOWBIT_INLINE void unpack_nibbles(const uint8_t* bytes, uint32_t fifth, __m512 low, __m512 high, Use use) {
    const __m512i codes = widen_bytes(bytes), shifted = _mm512_srli_epi32(codes, 4);
    use(0, _mm512_mask_permutexvar_ps(look_up(low, codes), static_cast<__mmask16>(fifth), codes, high));
    use(16, _mm512_mask_permutexvar_ps(look_up(low, shifted), static_cast<__mmask16>(fifth >> 16), shifted, high));
}
#endif

struct PlainF32 {
    static constexpr int elements = 1, bytes = 4;
    LOWBIT_INLINE void decode(const uint8_t* block, float* out) { std::memcpy(out, block, 4); }
};

struct PlainF16 {
    static constexpr int elements = 1, bytes = 2;
    LOWBIT_INLINE void decode(const uint8_t* block, float* out) { *out = half_at(block); }
};

struct PlainBF16 {
    static constexpr int elements = 1, bytes = 2;
    LOWBIT_INLINE void decode(const uint8_t* block, float* out) {
        BFloat16 value;
        std::memcpy(&value.bits, block, 2);
        *out = widen(value);
    }
};

struct BlockQ8_0 {
    static constexpr int elements = 32, bytes = 34;
#ifdef LOWBIT_AVX512
    template <typename Use>
    LOWBIT_INLINE void unpack(const uint8_t* block, Use use) {
        const __m512 d = halves_of(block);
        for (int i = 0; i < 32; i += 16)
            use(i, _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(load_bytes(block + 2 + i))), d));
    }
#else
    LOWBIT_INLINE void decode(const uint8_t* block, float* out) {
        const float d = half_at(block);
        const auto* q = reinterpret_cast<const int8_t*>(block + 2);
        for (int i = 0; i < 32; ++i) out[i] = static_cast<float>(q[i]) * d;
    }
#endif
};

struct BlockQ4_0 {
    static constexpr int elements = 32, bytes = 18;
#ifdef LOWBIT_AVX512
    template <typename Use>
    LOWBIT_INLINE void unpack(const uint8_t* block, Use use) {
        unpack_nibbles(block + 2, _mm512_mul_ps(halves_of(block), codes_from(-8)), 0, use);
    }
#else
    LOWBIT_INLINE void decode(const uint8_t* block, float* out) {
        const float d = half_at(block);
        const uint8_t* q = block + 2;
        for (int i = 0; i < 16; ++i) out[i] = d * static_cast<float>(static_cast<int>(q[i] & 15) - 8);
        for (int i = 0; i < 16; ++i) out[i + 16] = d * static_cast<float>(static_cast<int>(q[i] >> 4) - 8);
    }
#endif
};

struct BlockQ4_1 {
    static constexpr int elements = 32, bytes = 20;
#ifdef LOWBIT_AVX512
    template <typename Use>
    LOWBIT_INLINE void unpack(const uint8_t* block, Use use) {
        unpack_nibbles(block + 4, _mm512_fmadd_ps(halves_of(block), codes_from(0), halves_of(block + 2)), 0, use);
    }
#else
    LOWBIT_INLINE void decode(const uint8_t* block, float* out) {
        const float d = half_at(block), m = half_at(block + 2);
        const uint8_t* q = block + 4;
        for (int i = 0; i < 16; ++i) out[i] = d * static_cast<float>(q[i] & 15) + m;
        for (int i = 0; i < 16; ++i) out[i + 16] = d * static_cast<float>(q[i] >> 4) + m;
    }
#endif
};

// Bit i of four bytes, as 16.
LOWBIT_INLINE int fifth_bit(uint32_t bits, int i) { return static_cast<int>((bits >> i) & 1u) << 4; }

struct BlockQ5_0 {
    static constexpr int elements = 32, bytes = 22;
#ifdef LOWBIT_AVX512
    template <typename Use>
    LOWBIT_INLINE void unpack(const uint8_t* block, Use use) {
        const __m512 d = halves_of(block);
        unpack_nibbles(block + 6, word_at(block + 2), _mm512_mul_ps(d, codes_from(-16)), _mm512_mul_ps(d, codes_from(0)), use);
    }
#else
    LOWBIT_INLINE void decode(const uint8_t* block, float* out) {
        const float d = half_at(block);
        const uint32_t high = word_at(block + 2);
        const uint8_t* q = block + 6;
        for (int i = 0; i < 16; ++i) out[i] = d * static_cast<float>(((q[i] & 15) | fifth_bit(high, i)) - 16);
        for (int i = 0; i < 16; ++i) out[i + 16] = d * static_cast<float>(((q[i] >> 4) | fifth_bit(high, i + 16)) - 16);
    }
#endif
};

struct BlockQ5_1 {
    static constexpr int elements = 32, bytes = 24;
#ifdef LOWBIT_AVX512
    template <typename Use>
    LOWBIT_INLINE void unpack(const uint8_t* block, Use use) {
        const __m512 d = halves_of(block), m = halves_of(block + 2);
        const __m512 low = _mm512_fmadd_ps(d, codes_from(0), m), high = _mm512_fmadd_ps(d, codes_from(16), m);
        unpack_nibbles(block + 8, word_at(block + 4), low, high, use);
    }
#else
    LOWBIT_INLINE void decode(const uint8_t* block, float* out) {
        const float d = half_at(block), m = half_at(block + 2);
        const uint32_t high = word_at(block + 4);
        const uint8_t* q = block + 8;
        for (int i = 0; i < 16; ++i) out[i] = d * static_cast<float>((q[i] & 15) | fifth_bit(high, i)) + m;
        for (int i = 0; i < 16; ++i) out[i + 16] = d * static_cast<float>((q[i] >> 4) | fifth_bit(high, i + 16)) + m;
    }
#endif
};

#ifdef LOWBIT_AVX512
// The scales of the sixteen groups of Q2_K, times d, and their minimums, times dmin.
LOWBIT_INLINE void scales_and_minimums_of_q2_k(const uint8_t* block, float (&scales)[16], float (&minimums)[16]) {
    const __m512i packed = widen_bytes(block);
    const __m512 low = look_up(codes_from(0), packed), high = look_up(codes_from(0), _mm512_srli_epi32(packed, 4));
    _mm512_store_ps(scales, _mm512_mul_ps(halves_of(block + 80), low));
    _mm512_store_ps(minimums, _mm512_mul_ps(halves_of(block + 82), high));
}
#endif

struct BlockQ2_K {
    static constexpr int elements = 256, bytes = 84;
#ifdef LOWBIT_AVX512
    template <typename Use>
    LOWBIT_INLINE void unpack(const uint8_t* block, Use use) {
        alignas(64) float scales[16], minimums[16];
        scales_and_minimums_of_q2_k(block, scales, minimums);
#pragma GCC unroll 16
        for (int group = 0; group < 16; ++group) {
            const __m512i codes = widen_bytes(block + 16 + group / 8 * 32 + group % 2 * 16);
            const __m512 values = scaled(scales[group], two_bit_codes(1), minimums[group]);
            use(16 * group, look_up(values, _mm512_srli_epi32(codes, group % 8 / 2 * 2)));
        }
    }
#else
    LOWBIT_INLINE void decode(const uint8_t* block, float* out) {
        const float d = half_at(block + 80), dmin = half_at(block + 82);
        for (int group = 0; group < 16; ++group) {
            const float scale = d * static_cast<float>(block[group] & 15);
            const float minimum = dmin * static_cast<float>(block[group] >> 4);
            const uint8_t* q = block + 16 + group / 8 * 32 + group % 2 * 16;
            const int shift = group % 8 / 2 * 2;
            for (int i = 0; i < 16; ++i) out[16 * group + i] = scale * static_cast<float>((q[i] >> shift) & 3) - minimum;
        }
    }
#endif
};

#ifdef LOWBIT_AVX512
// The six-bit scales of the sixteen groups of Q3_K, less 32, times d: four bits of each in eight bytes, two in four more.
LOWBIT_INLINE void scales_of_q3_k(const uint8_t* block, float (&out)[16]) {
    const __m128i words = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(block + 96));  // a block ends soon after
    const __m128i low = _mm_srlv_epi64(_mm_unpacklo_epi64(words, words), _mm_set_epi64x(4, 0));
    const __m128i pairs = _mm_set1_epi32(static_cast<int>(word_at(block + 104)));
    const __m128i high = _mm_slli_epi32(_mm_and_si128(_mm_srlv_epi32(pairs, _mm_set_epi32(6, 4, 2, 0)), _mm_set1_epi8(3)), 4);
    const __m128i codes = _mm_or_si128(_mm_and_si128(low, _mm_set1_epi8(15)), high);
    const __m512i less = _mm512_sub_epi32(_mm512_cvtepu8_epi32(codes), _mm512_set1_epi32(32));
    _mm512_store_ps(out, _mm512_mul_ps(halves_of(block + 108), _mm512_cvtepi32_ps(less)));
    keep_in_memory(out);
}
#endif

struct BlockQ3_K {
    static constexpr int elements = 256, bytes = 110;
#ifdef LOWBIT_AVX512
    template <typename Use>
    LOWBIT_INLINE void unpack(const uint8_t* block, Use use) {
        alignas(64) float scales[16];
        scales_of_q3_k(block, scales);
        const __m512 codes = _mm512_broadcast_f32x8(_mm256_set_ps(3, 2, 1, 0, -1, -2, -3, -4));
#pragma GCC unroll 16
        for (int group = 0; group < 16; ++group) {
            const __m512i q = widen_bytes(block + 32 + group / 8 * 32 + group % 2 * 16);
            const __m512i third = move_bit(widen_bytes(block + group % 2 * 16), group / 2, 2);
            const __m512i code = choose_bits(3, _mm512_srli_epi32(q, group % 8 / 2 * 2), third);
            use(16 * group, look_up(_mm512_mul_ps(_mm512_set1_ps(scales[group]), codes), code));
        }
    }
#else
    LOWBIT_INLINE float scale_of(const uint8_t* block, int group, float d) {
        const uint8_t* scales = block + 96;
        const int low = (scales[group % 8] >> (group / 8 * 4)) & 15;
        const int high = (scales[8 + group % 4] >> (group / 4 * 2)) & 3;
        return d * static_cast<float>((low | (high << 4)) - 32);
    }

    LOWBIT_INLINE void decode(const uint8_t* block, float* out) {
        const float d = half_at(block + 108);
        for (int group = 0; group < 16; ++group) {
            const float scale = scale_of(block, group, d);
            const uint8_t* q = block + 32 + group / 8 * 32 + group % 2 * 16;
            const uint8_t* mask = block + group % 2 * 16;
            const int shift = group % 8 / 2 * 2, bit = group / 2;
            for (int i = 0; i < 16; ++i)
                out[16 * group + i] = scale * static_cast<float>(((q[i] >> shift) & 3) - (((mask[i] >> bit) & 1) ? 0 : 4));
        }
    }
#endif
};

#ifdef LOWBIT_AVX512
// The six-bit scales of the eight groups of Q4_K and Q5_K, times d, then their minimums, times dmin.
LOWBIT_INLINE void scales_and_minimums(const uint8_t* block, float (&out)[16]) {
    const __m128i words = load_bytes(block + 4);  // three; each gives a word of the result, with two bits of another
    const __m128i low = _mm_and_si128(_mm_srlv_epi32(_mm_shuffle_epi32(words, 0x98), _mm_set_epi32(4, 0, 0, 0)),
                                      _mm_set_epi32(0x0f0f0f0f, 0x3f3f3f3f, 0x0f0f0f0f, 0x3f3f3f3f));
    const __m128i high =
        _mm_and_si128(_mm_srli_epi32(_mm_shuffle_epi32(words, 0x50), 2), _mm_set_epi32(0x30303030, 0, 0x30303030, 0));
    const __m512 factors = _mm512_mask_mov_ps(halves_of(block), 0xff00, halves_of(block + 2));
    _mm512_store_ps(out, _mm512_mul_ps(factors, _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_or_si128(low, high)))));
    keep_in_memory(out);
}
#else
LOWBIT_INLINE void scales_and_minimums(const uint8_t* block, float (&out)[16]) {
    const float d = half_at(block), dmin = half_at(block + 2);
    const uint32_t words[3] = {word_at(block + 4), word_at(block + 8), word_at(block + 12)};
    const uint32_t unpacked[4] = {words[0] & 0x3f3f3f3fu, (words[2] & 0x0f0f0f0fu) | ((words[0] >> 2) & 0x30303030u),
                                  words[1] & 0x3f3f3f3fu, ((words[2] >> 4) & 0x0f0f0f0fu) | ((words[1] >> 2) & 0x30303030u)};
    uint8_t six_bits[16];
    std::memcpy(six_bits, unpacked, sizeof six_bits);
    for (int i = 0; i < 16; ++i) out[i] = (i < 8 ? d : dmin) * static_cast<float>(six_bits[i]);
}
#endif

struct BlockQ4_K {
    static constexpr int elements = 256, bytes = 144;
#ifdef LOWBIT_AVX512
    template <typename Use>
    LOWBIT_INLINE void unpack(const uint8_t* block, Use use) {
        alignas(64) float scales[16];
        scales_and_minimums(block, scales);
#pragma GCC unroll 8
        for (int group = 0; group < 8; ++group) {
            const __m512 values = scaled(scales[group], codes_from(0), scales[8 + group]);
            for (int i = 0; i < 32; i += 16) {
                const __m512i codes = widen_bytes(block + 16 + group / 2 * 32 + i);
                use(32 * group + i, look_up(values, _mm512_srli_epi32(codes, group % 2 * 4)));
            }
        }
    }
#else
    LOWBIT_INLINE void decode(const uint8_t* block, float* out) {
        float scales[16];
        scales_and_minimums(block, scales);
        for (int group = 0; group < 8; ++group) {
            const uint8_t* q = block + 16 + group / 2 * 32;
            const int shift = group % 2 * 4;
            for (int i = 0; i < 32; ++i)
                out[32 * group + i] = scales[group] * static_cast<float>((q[i] >> shift) & 15) - scales[8 + group];
        }
    }
#endif
};

struct BlockQ5_K {
    static constexpr int elements = 256, bytes = 176;
#ifdef LOWBIT_AVX512
    template <typename Use>
    LOWBIT_INLINE void unpack(const uint8_t* block, Use use) {
        alignas(64) float scales[16];
        scales_and_minimums(block, scales);
#pragma GCC unroll 8
        for (int group = 0; group < 8; ++group) {
            const __m512 low = scaled(scales[group], codes_from(0), scales[8 + group]);
            const __m512 high = scaled(scales[group], codes_from(16), scales[8 + group]);
            for (int i = 0; i < 32; i += 16) {
                const __m512i nibbles = _mm512_srli_epi32(widen_bytes(block + 48 + group / 2 * 32 + i), group % 2 * 4);
                const __m512i fifth = move_bit(widen_bytes(block + 16 + i), group, 4);
                use(32 * group + i, look_up(low, high, choose_bits(15, nibbles, fifth)));
            }
        }
    }
#else
    LOWBIT_INLINE void decode(const uint8_t* block, float* out) {
        float scales[16];
        scales_and_minimums(block, scales);
        const uint8_t* high = block + 16;
        for (int group = 0; group < 8; ++group) {
            const uint8_t* q = block + 48 + group / 2 * 32;
            const int shift = group % 2 * 4;
            for (int i = 0; i < 32; ++i) {
                const int code = ((q[i] >> shift) & 15) | (((high[i] >> group) & 1) << 4);
                out[32 * group + i] = scales[group] * static_cast<float>(code) - scales[8 + group];
            }
        }
    }
#endif
};

#ifdef LOWBIT_AVX512
// The scales of the sixteen groups of Q6_K, times d.
LOWBIT_INLINE void scales_of_q6_k(const uint8_t* block, float (&out)[16]) {
    const __m512i packed = _mm512_cvtepi8_epi32(load_bytes(block + 192));
    _mm512_store_ps(out, _mm512_mul_ps(halves_of(block + 208), _mm512_cvtepi32_ps(packed)));
    keep_in_memory(out);
}
#endif

struct BlockQ6_K {
    static constexpr int elements = 256, bytes = 210;
#ifdef LOWBIT_AVX512
    template <typename Use>
    LOWBIT_INLINE void unpack(const uint8_t* block, Use use) {
        alignas(64) float scales[16];
        scales_of_q6_k(block, scales);
#pragma GCC unroll 16
        for (int group = 0; group < 16; ++group) {
            const int half = group / 8, quarter = group % 8 / 2, half_group = group % 2 * 16;
            const __m512i low = widen_bytes(block + 64 * half + quarter % 2 * 32 + half_group);
            const __m512i high = widen_bytes(block + 128 + 32 * half + half_group);
            const __m512 value = _mm512_add_ps(look_up(codes_from(-32), _mm512_srli_epi32(low, quarter / 2 * 4)),
                                               look_up(two_bit_codes(16), _mm512_srli_epi32(high, 2 * quarter)));
            use(16 * group, _mm512_mul_ps(_mm512_set1_ps(scales[group]), value));
        }
    }
#else
    LOWBIT_INLINE void decode(const uint8_t* block, float* out) {
        const float d = half_at(block + 208);
        for (int group = 0; group < 16; ++group) {
            const int half = group / 8, quarter = group % 8 / 2;
            const float scale = d * static_cast<float>(static_cast<int8_t>(block[192 + group]));
            const uint8_t* low = block + 64 * half + quarter % 2 * 32 + group % 2 * 16;
            const uint8_t* high = block + 128 + 32 * half + group % 2 * 16;
            const int low_shift = quarter / 2 * 4, high_shift = 2 * quarter;
            for (int i = 0; i < 16; ++i) {
                const int code = ((low[i] >> low_shift) & 15) | (((high[i] >> high_shift) & 3) << 4);
                out[16 * group + i] = scale * static_cast<float>(code - 32);
            }
        }
    }
#endif
};

struct BlockIQ4_NL {
    static constexpr int elements = 32, bytes = 18;
#ifdef LOWBIT_AVX512
    template <typename Use>
    LOWBIT_INLINE void unpack(const uint8_t* block, Use use) {
        unpack_nibbles(block + 2, _mm512_mul_ps(halves_of(block), _mm512_loadu_ps(kIq4Values)), 0, use);
    }
#else
    LOWBIT_INLINE void decode(const uint8_t* block, float* out) {
        const float d = half_at(block);
        const uint8_t* q = block + 2;
        for (int i = 0; i < 16; ++i) out[i] = d * kIq4Values[q[i] & 15];
        for (int i = 0; i < 16; ++i) out[i + 16] = d * kIq4Values[q[i] >> 4];
    }
#endif
};

#ifdef LOWBIT_AVX512
// The six-bit scales of the eight groups of IQ4_XS, less 32, times d: two bits of each in two bytes, four in four more. Twice.
LOWBIT_INLINE void scales_of_iq4_xs(const uint8_t* block, float (&out)[16]) {
    const __m512i steps = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3, 4, 5, 6, 7);
    const __m512i low = _mm512_srlv_epi32(_mm512_set1_epi32(static_cast<int>(word_at(block + 4))), _mm512_slli_epi32(steps, 2));
    const __m512i high =
        _mm512_srlv_epi32(_mm512_set1_epi32(static_cast<int>(word_at(block) >> 16)), _mm512_slli_epi32(steps, 1));
    const __m512i codes = _mm512_or_si512(_mm512_and_si512(low, _mm512_set1_epi32(15)),
                                          _mm512_slli_epi32(_mm512_and_si512(high, _mm512_set1_epi32(3)), 4));
    const __m512i less = _mm512_sub_epi32(codes, _mm512_set1_epi32(32));
    _mm512_store_ps(out, _mm512_mul_ps(halves_of(block), _mm512_cvtepi32_ps(less)));
    keep_in_memory(out);
}
#endif

struct BlockIQ4_XS {
    static constexpr int elements = 256, bytes = 136;
#ifdef LOWBIT_AVX512
    template <typename Use>
    LOWBIT_INLINE void unpack(const uint8_t* block, Use use) {
        alignas(64) float scales[16];
        scales_of_iq4_xs(block, scales);
#pragma GCC unroll 8
        for (int group = 0; group < 8; ++group) {
            const __m512 scale = _mm512_set1_ps(scales[group]);
            unpack_nibbles(block + 8 + 16 * group, _mm512_mul_ps(scale, _mm512_loadu_ps(kIq4Values)), 32 * group, use);
        }
    }
#else
    LOWBIT_INLINE float scale_of(const uint8_t* block, int group, float d) {
        const int low = (block[4 + group / 2] >> (group % 2 * 4)) & 15;
        const int high = (block[2 + group / 4] >> (group % 4 * 2)) & 3;
        return d * static_cast<float>((low | (high << 4)) - 32);
    }

    LOWBIT_INLINE void decode(const uint8_t* block, float* out) {
        const float d = half_at(block);
        for (int group = 0; group < 8; ++group) {
            const float scale = scale_of(block, group, d);
            const uint8_t* q = block + 8 + 16 * group;
            float* to = out + 32 * group;
            for (int i = 0; i < 16; ++i) to[i] = scale * kIq4Values[q[i] & 15];
            for (int i = 0; i < 16; ++i) to[i + 16] = scale * kIq4Values[q[i] >> 4];
        }
    }
#endif
};

LOWBIT_END
#endif  // LOWBIT_NATIVE_KERNELS_GGUF_BLOCKS_H
