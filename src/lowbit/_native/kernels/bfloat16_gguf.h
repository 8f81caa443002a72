// Blocks of GGUF files decoded to bfloat16 for products of rows of that type; the values are those of gguf_blocks.h, rounded
// once more.
//
// Codes of four and five bits are looked up in a register of 32 words, and written in the order in which shifts find them.
#ifndef LOWBIT_NATIVE_KERNELS_BFLOAT16_GGUF_H
#define LOWBIT_NATIVE_KERNELS_BFLOAT16_GGUF_H

#include "bfloat16_decode.h"
#include "gguf_blocks.h"

LOWBIT_BEGIN(gemm)

using base::BlockIQ4_NL;
using base::BlockIQ4_XS;
using base::BlockQ2_K;
using base::BlockQ3_K;
using base::BlockQ4_0;
using base::BlockQ4_1;
using base::BlockQ4_K;
using base::BlockQ5_0;
using base::BlockQ5_1;
using base::BlockQ5_K;
using base::BlockQ6_K;
using base::BlockQ8_0;
using base::codes_from;
using base::halves_of;
using base::kIq4Values;
using base::scaled;
using base::scales_and_minimums;
using base::scales_of_iq4_xs;
using base::scales_of_q6_k;

template <typename Block>
LOWBIT_INLINE void decode_words(Block, const uint8_t* block, BFloat16* output) {
    __m512 before;
    Block::unpack(block, [&](int i, __m512 values) LOWBIT_INLINE_LAMBDA {
        if (i % kWords == 0) before = values;
        else _mm512_storeu_si512(output + i - kWords / 2, round_pair(before, values));
    });
}

alignas(64) constexpr uint16_t kEvenFirst[32] = {0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30,
                                                 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31};

// Of each eight the first four, then the second.
alignas(64) constexpr uint16_t kQuadOrder[32] = {0, 1, 2, 3, 8,  9,  10, 11, 16, 17, 18, 19, 24, 25, 26, 27,
                                                 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31};

// Inputs i and i + 16 in a byte; even ones first.
LOWBIT_INLINE void decode_halves(const uint8_t* codes, __m512 values, BFloat16* output) {
    _mm512_storeu_si512(output, _mm512_permutexvar_epi16(nibble_indices(codes), round_pair(values, values)));
}

LOWBIT_INLINE void decode_words(BlockQ4_0, const uint8_t* block, BFloat16* output) {
    decode_halves(block + 2, _mm512_mul_ps(halves_of(block), codes_from(-8)), output);
}

LOWBIT_INLINE void decode_words(BlockQ4_1, const uint8_t* block, BFloat16* output) {
    decode_halves(block + 4, _mm512_fmadd_ps(halves_of(block), codes_from(0), halves_of(block + 2)), output);
}

LOWBIT_INLINE void decode_words(BlockIQ4_NL, const uint8_t* block, BFloat16* output) {
    decode_halves(block + 2, _mm512_mul_ps(halves_of(block), _mm512_loadu_ps(kIq4Values)), output);
}

LOWBIT_INLINE void decode_words(BlockIQ4_XS, const uint8_t* block, BFloat16* output) {
    alignas(64) float scales[16];
    scales_of_iq4_xs(block, scales);
#pragma GCC unroll 8
    for (int group = 0; group < 8; ++group) {
        const __m512 scale = _mm512_set1_ps(scales[group]);
        decode_halves(block + 8 + 16 * group, _mm512_mul_ps(scale, _mm512_loadu_ps(kIq4Values)), output + 32 * group);
    }
}

LOWBIT_INLINE __m512i broadcast_32(const uint8_t* bytes) {
    return _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(bytes)));
}

// Of 32 bytes the even ones, then the odd ones, in the lower half of each word; what is above is not theirs.
LOWBIT_INLINE __m512i bytes_to_words(const uint8_t* bytes) {
    const __m512i shifts = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi16(8), 1);
    return _mm512_srlv_epi16(broadcast_32(bytes), shifts);
}

LOWBIT_INLINE void decode_words(BlockQ4_K, const uint8_t* block, BFloat16* output) {
    alignas(64) float scales[16];
    scales_and_minimums(block, scales);
    const __m512i low = _mm512_set_epi64(0x37372f2f27271f1f, 0x37372f2f27271f1f, 0x37372f2f27271f1f, 0x37372f2f27271f1f,
                                         0x17170f0f0707ffff, 0x17170f0f0707ffff, 0x17170f0f0707ffff, 0x17170f0f0707ffff);
    const __m512i high = _mm512_add_epi8(low, _mm512_set1_epi8(4));
    const __m512i first_table = _mm512_set1_epi16(0x0100), second_table = _mm512_set1_epi16(0x2120);
#pragma GCC unroll 4
    for (int group = 0; group < 8; group += 2) {
        const __m512 values = scaled(scales[group], codes_from(0), scales[8 + group]);
        const __m512 others = scaled(scales[group + 1], codes_from(0), scales[9 + group]);
        const __m512i words = round_pair(values, others), codes = broadcast_32(block + 16 + group * 16);
        _mm512_storeu_si512(output + 32 * group, look_up_pairs(codes, low, first_table, words));
        _mm512_storeu_si512(output + 32 * group + 32, look_up_pairs(codes, high, second_table, words));
    }
}

// Bits 0 ... 3 of `low`, all others of `high`.
LOWBIT_INLINE __m512i join_bits(__m512i low, __m512i high) {
    return _mm512_ternarylogic_epi32(_mm512_set1_epi16(15), low, high, 0xca);
}

LOWBIT_INLINE void decode_words(BlockQ5_K, const uint8_t* block, BFloat16* output) {
    alignas(64) float scales[16];
    scales_and_minimums(block, scales);
    const __m512i fifths = bytes_to_words(block + 16);
#pragma GCC unroll 4
    for (int pair = 0; pair < 4; ++pair) {
        const __m512i bytes = bytes_to_words(block + 48 + pair * 32);
#pragma GCC unroll 2
        for (int group = 2 * pair; group < 2 * pair + 2; ++group) {
            const __m512 low = scaled(scales[group], codes_from(0), scales[8 + group]);
            const __m512 high = scaled(scales[group], codes_from(16), scales[8 + group]);
            const __m512i fifth = group < 4 ? _mm512_slli_epi16(fifths, 4 - group) : _mm512_srli_epi16(fifths, group - 4);
            const __m512i codes = join_bits(group % 2 ? _mm512_srli_epi16(bytes, 4) : bytes, fifth);
            _mm512_storeu_si512(output + 32 * group, _mm512_permutexvar_epi16(codes, round_pair(low, high)));
        }
    }
}

// Codes of six bits, the lowest of which is bit kShift, less 32; exact: they are the last bits of 2**(23 - kShift) + code.
template <int kShift>
LOWBIT_INLINE __m512 six_bits(__m512i codes) {
    constexpr float kLarge = 8388608 >> kShift;
    const __m512i large = _mm512_castps_si512(_mm512_set1_ps(kLarge));
    const __m512i bits = _mm512_ternarylogic_epi32(codes, _mm512_set1_epi32(63 << kShift), large, 0xea);
    return _mm512_sub_ps(_mm512_castsi512_ps(bits), _mm512_set1_ps(kLarge + 32.0f));
}

// Of the words, too, the even ones come first: kNibbleOrder.
LOWBIT_INLINE void decode_words(BlockQ6_K, const uint8_t* block, BFloat16* output) {
    alignas(64) float scales[16];
    scales_of_q6_k(block, scales);
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
        const __m512i high = bytes_to_words(block + 128 + 32 * half);
        const __m512i low[2] = {bytes_to_words(block + 64 * half), bytes_to_words(block + 64 * half + 32)};
#pragma GCC unroll 4
        for (int quarter = 0; quarter < 4; ++quarter) {
            const int group = 4 * half + quarter;
            const __m512i upper =
                quarter < 2 ? _mm512_slli_epi16(high, 4 - 2 * quarter) : _mm512_srli_epi16(high, 2 * quarter - 4);
            const __m512i codes = join_bits(quarter < 2 ? low[quarter] : _mm512_srli_epi16(low[quarter - 2], 4), upper);
            const __m512 first = _mm512_set1_ps(scales[2 * group]);  // of the first 16 inputs, which are in these words
            const __m512 scale = _mm512_mask_broadcastss_ps(first, 0xf0f0, _mm_load_ss(scales + 2 * group + 1));
            const __m512 even = _mm512_mul_ps(six_bits<0>(codes), scale), odd = _mm512_mul_ps(six_bits<16>(codes), scale);
            _mm512_storeu_si512(output + 32 * group, round_pair(even, odd));
        }
    }
}

// Two blocks: values are rounded together, and a code's fifth bit says which block it is of.
LOWBIT_INLINE void decode_pair(BlockQ4_0, const uint8_t* block, BFloat16* output) {
    constexpr int kBytes = BlockQ4_0::bytes;
    const __m512 first = _mm512_mul_ps(halves_of(block), codes_from(-8));
    const __m512i words = round_pair(first, _mm512_mul_ps(halves_of(block + kBytes), codes_from(-8)));
    const __m512i low = _mm512_set1_epi16(15), second = _mm512_set1_epi16(16);
    _mm512_storeu_si512(output, _mm512_permutexvar_epi16(_mm512_and_si512(nibble_indices(block + 2), low), words));
    const __m512i codes = _mm512_ternarylogic_epi32(nibble_indices(block + kBytes + 2), low, second, 0xea);
    _mm512_storeu_si512(output + 32, _mm512_permutexvar_epi16(codes, words));
}

template <typename Block>
LOWBIT_INLINE void decode_blocks(const void* weight, int64_t row, int64_t first, int64_t count, BFloat16* output) {
    const auto& rows = *static_cast<const GgufRows*>(weight);
    const uint8_t* from = rows.input + row * rows.row_bytes + first / Block::elements * Block::bytes;
    int64_t i = 0;
    if constexpr (std::is_same<Block, BlockQ4_0>::value)
        for (; i + 2 * Block::elements <= count; i += 2 * Block::elements, from += 2 * Block::bytes)
            decode_pair(Block{}, from, output + i);
    for (; i < count; i += Block::elements, from += Block::bytes) decode_words(Block{}, from, output + i);
}

// Through float32.
void decode_plain(const void* weight, int64_t row, int64_t first, int64_t count, BFloat16* output) {
    const auto& rows = *static_cast<const GgufRows*>(weight);
    alignas(64) float values[kMostDecoded];
    const uint8_t* from = rows.input + row * rows.row_bytes + first / rows.kernels->elements * rows.kernels->bytes;
    rows.kernels->decode({from, count, values, kFloat32}, 0, 1);
    for (int64_t i = 0; i < count; i += kWords)
        _mm512_storeu_si512(output + i, round_pair(_mm512_load_ps(values + i), _mm512_load_ps(values + i + 16)));
}

struct GgufDecoder {
    int number;  // ggml's, of the type
    ChannelKernels kernels;
    const uint16_t* order;
};

constexpr GgufDecoder kGgufDecoders[] = {
    {8, kKernelsOf<Each<decode_blocks<BlockQ8_0>>>, nullptr},
    {2, kKernelsOf<Each<decode_blocks<BlockQ4_0>>>, kEvenFirst},
    {3, kKernelsOf<Each<decode_blocks<BlockQ4_1>>>, kEvenFirst},
    {6, kKernelsOf<Each<decode_blocks<BlockQ5_0>>>, nullptr},
    {7, kKernelsOf<Each<decode_blocks<BlockQ5_1>>>, nullptr},
    {10, kKernelsOf<Each<decode_blocks<BlockQ2_K>>>, nullptr},
    {11, kKernelsOf<Each<decode_blocks<BlockQ3_K>>>, nullptr},
    {12, kKernelsOf<Each<decode_blocks<BlockQ4_K>>>, kQuadOrder},
    {13, kKernelsOf<Each<decode_blocks<BlockQ5_K>>>, kEvenFirst},
    {14, kKernelsOf<Each<decode_blocks<BlockQ6_K>>>, kNibbleOrder},
    {20, kKernelsOf<Each<decode_blocks<BlockIQ4_NL>>>, kEvenFirst},
    {23, kKernelsOf<Each<decode_blocks<BlockIQ4_XS>>>, kEvenFirst},
};

BFloat16Decoder gguf_decoder(const GgufRows& rows) {
    GgufDecoder decoder{0, kSlowKernelsOf<decode_plain>, nullptr};
    for (const GgufDecoder& known : kGgufDecoders)
        if (known.number == rows.kernels->number) decoder = known;
    const int64_t bytes_of_256 = 256 / rows.kernels->elements * rows.kernels->bytes;
    return {decoder.kernels.decode,
            decoder.kernels.multiply_few_rows,
            decoder.order,
            rows.input,
            rows.row_bytes,
            bytes_of_256,
            nullptr};
}

LOWBIT_END
#endif  // LOWBIT_NATIVE_KERNELS_BFLOAT16_GGUF_H
