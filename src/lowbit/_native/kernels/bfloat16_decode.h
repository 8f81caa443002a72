// Weights of 8 and 4 bits decoded to bfloat16 for products of rows of that type, a channel's inputs at a time.
//
// A value is what weight_only.h's is, rounded once more. Codes of 4 bits are looked up in a register that holds 32 words:
// one block's 16 values twice, or those of two blocks of 16 inputs. They are written in the order in which shifts find
// them, and the activations are brought to it.
#ifndef LOWBIT_NATIVE_KERNELS_BFLOAT16_DECODE_H
#define LOWBIT_NATIVE_KERNELS_BFLOAT16_DECODE_H

#include "few_rows.h"

#if LOWBIT_TARGET == LOWBIT_TARGET_AMX
#include "amx_few_rows.h"
#else
#include "bfloat16_few_rows.h"
#endif
#include "../runtime.h"

LOWBIT_BEGIN(gemm)

LOWBIT_INLINE __m512i round_pair(__m512 low, __m512 high) {
    const __m512bh rounded = _mm512_cvtne2ps_pbh(high, low);
    return reinterpret_cast<const __m512i&>(rounded);
}

// Whole registers of codes of one scale.
template <bool kHasZero>
LOWBIT_INLINE void decode_block(const Int8* codes, int64_t count, float scale, float zero, __m512i&, BFloat16* output) {
    for (int64_t i = 0; i < count; i += kWords) {
        __m512 values[2];
        for (int half = 0; half < 2; ++half) {
            const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + i) + half);
            values[half] = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes));
            if (kHasZero) values[half] = _mm512_sub_ps(values[half], _mm512_set1_ps(zero));
            values[half] = _mm512_mul_ps(values[half], _mm512_set1_ps(scale));
        }
        _mm512_storeu_si512(output + i, round_pair(values[0], values[1]));
    }
}

// As decode_as_half of weight_only.h; keeps the largest magnitude, by which a NaN is known.
template <bool>
LOWBIT_INLINE void decode_block(const E4M3* codes, int64_t count, float scale, float, __m512i& largest, BFloat16* output) {
    const __m512i bits = _mm512_set1_epi16(static_cast<int16_t>(0xbf80));
    const __m512 factor = _mm512_set1_ps(scale * 256.0f);
    for (int64_t i = 0; i < count; i += kWords) {
        const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + i));
        const __m512i half = _mm512_and_si512(_mm512_slli_epi16(_mm512_cvtepi8_epi16(bytes), 7), bits);
        largest = _mm512_max_epu16(largest, _mm512_slli_epi16(half, 1));  // without the sign
        const __m512 low = _mm512_mul_ps(_mm512_cvtph_ps(_mm512_castsi512_si256(half)), factor);
        const __m512 high = _mm512_mul_ps(_mm512_cvtph_ps(_mm512_extracti64x4_epi64(half, 1)), factor);
        _mm512_storeu_si512(output + i, round_pair(low, high));
    }
}

LOWBIT_INLINE bool are_numbers(Int8, __m512i, float) { return true; }

// Whether decode_block of e4m3 decoded no NaN, and by no scale of which 256 times is too large.
LOWBIT_INLINE bool are_numbers(E4M3, __m512i largest, float largest_scale) {
    return !_mm512_cmpeq_epi16_mask(largest, _mm512_set1_epi16(0x7f << 8)) && largest_scale < 1e36f;
}

// A function that decodes inputs of a channel as what multiply_few_rows takes.
template <void (*Decode)(const void*, int64_t, int64_t, int64_t, BFloat16*)>
struct Each {
    static constexpr int64_t kScaledInputs = 0;
    const void* weight;
    explicit Each(const void* all) : weight(all) {}
    void operator()(int64_t channel, int64_t first, int64_t count, BFloat16* output) const {
        Decode(weight, channel, first, count, output);
    }
};

struct ChannelKernels {
    decltype(BFloat16Decoder::decode) decode;
    decltype(BFloat16Decoder::multiply_few_rows) multiply_few_rows;
};

template <typename Channel>
constexpr ChannelKernels kKernelsOf{decode_channel<Channel>, multiply_few_rows<Channel>};

// Of a decoder that takes long.
template <void (*Decode)(const void*, int64_t, int64_t, int64_t, BFloat16*)>
constexpr ChannelKernels kSlowKernelsOf{Decode, multiply_few_rows<AnyChannel>};

// Inputs of a chunk, whatever the codes, the scales and the size of the blocks.
template <typename Code>
LOWBIT_NOINLINE void decode_slowly(const WeightJob& job, int64_t channel, int64_t first, int64_t count, BFloat16* output) {
    const Code* codes = base::channel_codes<Code>(job, channel) + first;
    float scales[base::kChunk / 16 + 1];
    base::spread_scales(job, channel, first, count, scales);
    for (int64_t i = 0; i < count; i += kWords) {
        __m512 values[2];
        base::decode_steps(codes, i, count - i, values);
        values[0] = _mm512_mul_ps(values[0], _mm512_set1_ps(scales[i / 16]));
        values[1] = _mm512_mul_ps(values[1], _mm512_set1_ps(scales[i / 16 + 1]));
        _mm512_storeu_si512(output + i, round_pair(values[0], values[1]));
    }
}

// Blocks whose size is a multiple of 32, or whole rows of which 32 is a divisor.
template <typename Code, bool kHasZero>
void decode_bytes(const void* weight, int64_t channel, int64_t first, int64_t count, BFloat16* output) {
    const auto& job = *static_cast<const WeightJob*>(weight);
    const Code* codes = base::channel_codes<Code>(job, channel) + first;
    const int64_t row = base::quotient(channel, job.block_rows) * base::quotient_up(job.depth, job.block_columns);
    int64_t index = row + base::quotient(first, job.block_columns);
    int64_t left = (index - row + 1) * job.block_columns - first;  // of the first block
    for (int64_t done = 0; done < count;) {
        const int64_t end = smaller(done + base::kChunk, count), begin = done;
        __m512i largest = _mm512_setzero_si512();
        float largest_scale = 0.0f;
        while (done < end) {
            const int64_t part = smaller(left, end - done);
            const float scale = base::scale_at(job, index, channel, first + done);
            if (std::fabs(scale) > largest_scale) largest_scale = std::fabs(scale);  // a NaN needs no care
            const float zero = kHasZero ? static_cast<const int16_t*>(job.zero_point)[index] : 0;
            decode_block<kHasZero>(codes + done, part, scale, zero, largest, output + done);
            done += part, left -= part;
            if (left == 0) ++index, left = job.block_columns;
        }
        if (!are_numbers(Code{}, largest, largest_scale))
            decode_slowly<Code>(job, channel, first + begin, end - begin, output + begin);
    }
}

// Blocks whose size is a multiple of 16, or whole rows.
template <typename Code>
void decode_even(const void* weight, int64_t channel, int64_t first, int64_t count, BFloat16* output) {
    for (int64_t done = 0; done < count; done += base::kChunk)
        decode_slowly<Code>(*static_cast<const WeightJob*>(weight), channel, first + done, smaller(base::kChunk, count - done),
                            output + done);
}

// Of each 32 codes in 16 bytes the lowest of each two bytes, then the second, ...
alignas(64) constexpr uint16_t kNibbleOrder[32] = {0, 4, 8,  12, 16, 20, 24, 28, 1, 5, 9,  13, 17, 21, 25, 29,
                                                   2, 6, 10, 14, 18, 22, 26, 30, 3, 7, 11, 15, 19, 23, 27, 31};

LOWBIT_INLINE __m512i broadcast_16(const uint8_t* bytes) {
    return _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes)));
}

// 32 codes in kNibbleOrder as indices of words, of which the instruction looks at the low five bits: what is above the fourth
// is the next code's.
LOWBIT_INLINE __m512i nibble_indices(const uint8_t* codes) {
    const __m512i shifts = _mm512_set_epi64(0x000c000c000c000c, 0x000c000c000c000c, 0x0008000800080008, 0x0008000800080008,
                                            0x0004000400040004, 0x0004000400040004, 0, 0);
    return _mm512_srlv_epi16(broadcast_16(codes), shifts);
}

// E2M1 in blocks of `block` inputs, a multiple of 32.
LOWBIT_INLINE void decode_nibbles(const uint8_t* codes, int64_t count, int64_t block, const float* scales, BFloat16* output) {
    for (int64_t i = 0; i < count; i += block, ++scales) {
        const __m512 table = _mm512_mul_ps(base::table_of(E2M1{}, 0.0f), _mm512_set1_ps(*scales));
        const __m512i words = round_pair(table, table);
        for (int64_t j = i; j < i + block; j += kWords)
            _mm512_storeu_si512(output + j, _mm512_permutexvar_epi16(nibble_indices(codes + j / 2), words));
    }
}

// The words that 32 codes of four bits stand for, by two tables of 16 of them. Code i is the four bits after bit `at[i]` of its
// eight bytes; both bytes of a word are looked up: this takes one step where looking up words takes two.
LOWBIT_INLINE __m512i look_up_pairs(__m512i codes, __m512i at, __m512i second_table, __m512i words) {
    const __m512i bits = _mm512_multishift_epi64_epi8(at, codes);
    return _mm512_permutexvar_epi8(_mm512_ternarylogic_epi32(bits, _mm512_set1_epi8(0x1e), second_table, 0xea), words);
}

// Where a multishift finds 32 codes in 16 bytes, in kNibbleOrder, each twice.
LOWBIT_INLINE __m512i nibble_places() {
    constexpr int64_t k4 = 0x0404040404040404;
    const __m512i first = _mm512_set1_epi64(0x2f2f1f1f0f0fffff);  // the word 16 i of 8 bytes, less the bit before
    return _mm512_add_epi8(first, _mm512_set_epi64(3 * k4, 3 * k4, 2 * k4, 2 * k4, k4, k4, 0, 0));
}

// 32 codes in kNibbleOrder, of two blocks of 16 inputs.
LOWBIT_INLINE __m512i look_up_half_blocks(const uint8_t* codes, __m512i words) {
    const __m512i second = _mm512_set4_epi32(0x21202120, 0x21202120, 0x01000100, 0x01000100);
    return look_up_pairs(broadcast_16(codes), nibble_places(), second, words);
}

// E2M1 in blocks of 16 inputs.
LOWBIT_INLINE void decode_half_blocks(const uint8_t* codes, int64_t count, const float* scales, BFloat16* output) {
    const __m512 table = base::table_of(E2M1{}, 0.0f);
    for (int64_t i = 0; i < count; i += kWords, codes += kWords / 2, scales += 2) {
        const __m512 first = _mm512_mul_ps(table, _mm512_set1_ps(scales[0])),
                     second = _mm512_mul_ps(table, _mm512_set1_ps(scales[1]));
        _mm512_storeu_si512(output + i, look_up_half_blocks(codes, round_pair(first, second)));
    }
}

LOWBIT_INLINE __m256i load_words(const BFloat16* from) { return _mm256_load_si256(reinterpret_cast<const __m256i*>(from)); }

// 16 words, twice.
LOWBIT_INLINE __m512i words_at(const BFloat16* from) { return _mm512_broadcast_i64x4(load_words(from)); }

// The 16 values of E2M1 times each scale of a byte (E8M0 or E4M3), times an outer one.
struct ScaledE2M1 {
    alignas(64) BFloat16 values[256][16];
    float outer;
    int scale_type = -1;

    LOWBIT_NOINLINE void fill(int type, float wanted) {
        for (uint32_t code = 0; code < 256; ++code) {
            const float scale = (type == 2 ? base::widen_e8m0(code) : base::widen_e4m3(code)) * wanted;
            const __m512 table = _mm512_mul_ps(base::table_of(E2M1{}, 0.0f), _mm512_set1_ps(scale));
            const __m512i words = round_pair(table, table);
            std::memcpy(values[code], &words, sizeof values[code]);
        }
        outer = wanted, scale_type = type;
    }
};

// Not inlined: compilers look up the thread's own again for each use.
LOWBIT_NOINLINE const ScaledE2M1& scaled_e2m1(const WeightJob& job) {
    auto& tables = scratch_object<ScaledE2M1>(Slot::kScaledE2M1);
    const float outer = job.outer_scale ? job.outer_scale[0] : 1.0f;
    if (tables.scale_type != job.scale_type || tables.outer != outer) tables.fill(job.scale_type, outer);
    return tables;
}

// Calls `each` for every 32 of `count` inputs, eight at a time with offsets that the compiler knows.
template <typename Each>
LOWBIT_INLINE void for_registers(int64_t count, Each each) {
    constexpr int64_t kTogether = 8;
    int64_t i = 0;
    for (; i + kTogether * kWords <= count; i += kTogether * kWords) {
#pragma GCC unroll 8
        for (int64_t j = 0; j < kTogether; ++j) each(i, j);
    }
    for (; i < count; i += kWords) each(i, 0);
}

// E2M1 with scales of a byte and one outer scale, in blocks of 16 or 32 inputs.
template <int64_t Block>
struct LookedUp {
    static constexpr int64_t kScaledInputs = 0;
    const WeightJob& job;
    const BFloat16 (*values)[16];

    explicit LookedUp(const void* weight) : job(*static_cast<const WeightJob*>(weight)), values(scaled_e2m1(job).values) {}

    void operator()(int64_t channel, int64_t first, int64_t count, BFloat16* output) const {
        const uint64_t at = static_cast<uint64_t>(channel * job.depth + first);
        const auto* all_codes = static_cast<const uint8_t*>(job.weight) + at / 2;
        const auto* all_scales = static_cast<const uint8_t*>(job.scale) + at / Block;
        const auto* table = values;
        for_registers(count, [=](int64_t from, int64_t j) LOWBIT_INLINE_LAMBDA {
            const uint8_t *codes = all_codes + from / 2 + j * kWords / 2,
                          *scales = all_scales + from / Block + j * kWords / Block;
            __m512i words;
            if (Block == 16) {
                // A masked load takes the unit less that looking up waits for than inserting.
                words = _mm512_mask_broadcast_i64x4(words_at(table[scales[0]]), 0xf0, load_words(table[scales[1]]));
                words = look_up_half_blocks(codes, words);
            } else {
                words = _mm512_permutexvar_epi16(nibble_indices(codes), words_at(table[scales[0]]));
            }
            _mm512_storeu_si512(output + from + j * kWords, words);
        });
    }
};

// Codes of a block, by the first or the second half of the words.
LOWBIT_INLINE void write_half(const uint8_t* codes, int64_t count, __m512i words, __m512i half, BFloat16* output) {
#pragma GCC unroll 4
    for (int64_t i = 0; i < count; i += kWords)
        _mm512_storeu_si512(output + i, look_up_pairs(broadcast_16(codes + i / 2), nibble_places(), half, words));
}

// The bytes as float32: spreading one of them over a register takes no unit that looking up waits for.
struct BytesAsFloats {
    float values[256];
    constexpr BytesAsFloats() : values() {
        for (int i = 0; i < 256; ++i) values[i] = static_cast<float>(i);
    }
};
constexpr BytesAsFloats kBytesAsFloats;

// int4; kBlock inputs, of which depth is a multiple, have a scale, or any multiple of 32 (0). Values are rounded for two blocks at
// once.
template <typename Scale, int64_t kBlock, bool kHasZero>
LOWBIT_INLINE void decode_int4(const void* weight, int64_t channel, int64_t first, int64_t count, BFloat16* output) {
    const auto& job = *static_cast<const WeightJob*>(weight);
    const int64_t block = kBlock ? kBlock : job.block_columns,
                  per_row = block >= job.depth ? 1 : base::quotient(job.depth, block);
    const auto* scales = static_cast<const Scale*>(job.scale) + channel * per_row;
    const auto* zeros = static_cast<const uint8_t*>(job.zero_point) + channel * per_row;
    const auto* codes = static_cast<const uint8_t*>(job.weight) + static_cast<uint64_t>(channel * job.depth + first) / 2;
    const __m512 values = base::table_of(Int4{}, kHasZero ? 0.0f : 8.0f);
    const auto scaled = [=](const Scale* scale, const uint8_t* zero) LOWBIT_INLINE_LAMBDA {
        const __m512 shifted = kHasZero ? _mm512_sub_ps(values, _mm512_set1_ps(kBytesAsFloats.values[*zero])) : values;
        return _mm512_mul_ps(shifted, _mm512_set1_ps(widen(*scale)));
    };
    const __m512i first_half = _mm512_set1_epi16(0x0100), second_half = _mm512_set1_epi16(0x2120);
    for (int64_t done = 0; done < count; done += base::kChunk) {  // whole blocks, or a part of one
        const int64_t part = smaller(base::kChunk, count - done), size = kBlock ? kBlock : smaller(block, part);
        const int64_t group = base::quotient(first + done, block);
        const Scale* scale = scales + group;
        const uint8_t* zero = zeros + group;
        for (int64_t i = done; i < done + part; i += 2 * size, scale += 2, zero += 2) {
            const bool are_two = i + size < done + part;
            const __m512 low = scaled(scale, zero);
            const __m512i words = round_pair(low, are_two ? scaled(scale + 1, zero + 1) : low);
            write_half(codes + i / 2, size, words, first_half, output + i);
            if (are_two) write_half(codes + (i + size) / 2, size, words, second_half, output + i + size);
        }
    }
}

// E2M1 in any groups that split_activations takes.
void decode_pairs(const void* weight, int64_t channel, int64_t first, int64_t count, BFloat16* output) {
    const auto& job = *static_cast<const WeightJob*>(weight);
    const auto* codes = reinterpret_cast<const uint8_t*>(base::channel_codes<E2M1>(job, channel)) + first / 2;
    for (; count > 0; count -= base::kChunk, first += base::kChunk, codes += base::kChunk / 2, output += base::kChunk) {
        const int64_t part = smaller(base::kChunk, count), block = smaller(job.block_columns, part);
        base::BlockScales scales;
        base::load_block_scales<E2M1>(job, channel, first, base::quotient_up(part, block), scales);
        if (block == 16) decode_half_blocks(codes, part, scales.scales, output);
        else decode_nibbles(codes, part, block, scales.scales, output);
    }
}

// Of each E8M0 scale what is to be added to two bfloat16 to multiply them.
struct Powers {
    uint32_t values[256];

    constexpr Powers() : values() {
        for (uint32_t code = 0; code < 256; ++code) values[code] = ((code - 127) << 7 & 0xffff) * 0x10001u;
    }
};
constexpr Powers kPowers;

LOWBIT_INLINE __m512i power_of(uint8_t scale) { return _mm512_set1_epi32(static_cast<int>(kPowers.values[scale])); }

// Whether none of at most 16 E8M0 scales is so far from 1 that results might not be normal numbers.
LOWBIT_INLINE bool are_near(const uint8_t* scales, int64_t count) {
    const __m128i codes = _mm_mask_loadu_epi8(_mm_set1_epi8(127), column_mask(count), scales);
    const __m128i beyond = _mm_subs_epu8(_mm_sub_epi8(codes, _mm_set1_epi8(127 - 60)), _mm_set1_epi8(120));
    return _mm_testz_si128(beyond, beyond);
}

// E2M1 in blocks of 32 inputs with scales of E8M0 times outer ones.
LOWBIT_INLINE void decode_mxfp4(const void* weight, int64_t channel, int64_t first, int64_t count, BFloat16* output) {
    constexpr float kLargest = 0x1p60f;
    constexpr __mmask32 kNotZero = 0xfefefefe;
    const auto& job = *static_cast<const WeightJob*>(weight);
    for (int64_t done = 0; done < count; done += base::kChunk) {
        const int64_t part = smaller(base::kChunk, count - done), at = channel * job.depth + first + done;
        const float outer = base::outer_scale_at(job, channel, first + done);
        const auto* scales = static_cast<const uint8_t*>(job.scale) + at / kWords;
        if (!are_near(scales, part / kWords) || !(outer > 1 / kLargest && outer < kLargest)) {
            decode_pairs(weight, channel, first + done, part, output + done);
            continue;
        }
        const auto* codes = static_cast<const uint8_t*>(job.weight) + at / 2;
        const __m512 table = _mm512_mul_ps(base::table_of(E2M1{}, 0.0f), _mm512_set1_ps(outer));
        const __m512i values = round_pair(table, table);
        BFloat16* to = output + done;
        for_registers(part, [=](int64_t from, int64_t j) LOWBIT_INLINE_LAMBDA {
            const __m512i power = power_of(scales[from / kWords + j]);
            const __m512i words = _mm512_mask_add_epi16(values, kNotZero, values, power);
            const __m512i indices = nibble_indices(codes + from / 2 + j * kWords / 2);
            _mm512_storeu_si512(to + from + j * kWords, _mm512_permutexvar_epi16(indices, words));
        });
    }
}

// Both bytes of the bfloat16 that a code of E4M3 is. A normal number's upper byte follows from the code's upper four bits, its
// lower byte is the lower four; the eight numbers below and NaN are looked up by the lower six bits.
struct E4M3Tables {
    alignas(64) uint8_t upper[64] = {}, special_upper[64] = {}, special_lower[64] = {};
    constexpr E4M3Tables() {
        constexpr uint16_t kSubnormal[8] = {0, 0x3b00, 0x3b80, 0x3bc0, 0x3c00, 0x3c20, 0x3c40, 0x3c60};  // / 512
        for (int i = 0; i < 64; ++i) upper[i] = static_cast<uint8_t>((i & 8 ? 0x80 : 0) | ((i & 7) + 60));
        for (int i = 0; i < 8; ++i)
            special_upper[i] = static_cast<uint8_t>(kSubnormal[i] >> 8), special_lower[i] = static_cast<uint8_t>(kSubnormal[i]);
        special_upper[63] = 0x7f, special_lower[63] = 0xc0;
    }
};
constexpr E4M3Tables kE4M3;

// 64 codes -> bfloat16, and which of them, in another order, were looked up.
LOWBIT_INLINE __mmask64 widen_e4m3(__m512i codes, __m512i (&words)[2]) {
    codes = _mm512_permutexvar_epi64(_mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7), codes);  // so that pairs of bytes are in order
    const __m512i sign = _mm512_set1_epi8(static_cast<char>(0x80));
    __m512i lower = _mm512_and_si512(_mm512_slli_epi16(codes, 4), _mm512_set1_epi8(static_cast<char>(0xf0)));
    __m512i upper = _mm512_permutexvar_epi8(_mm512_srli_epi16(codes, 4), _mm512_load_si512(kE4M3.upper));
    const __m512i above = _mm512_sub_epi8(_mm512_andnot_si512(sign, codes), _mm512_set1_epi8(8));  // the smallest normal one
    const __mmask64 special = _mm512_cmpge_epu8_mask(above, _mm512_set1_epi8(0x7f - 8));
    if (special) {
        lower = _mm512_mask_permutexvar_epi8(lower, special, codes, _mm512_load_si512(kE4M3.special_lower));
        upper = _mm512_mask_permutexvar_epi8(upper, special, codes, _mm512_load_si512(kE4M3.special_upper));
        upper = _mm512_or_si512(upper, _mm512_and_si512(codes, sign));
    }
    words[0] = _mm512_unpacklo_epi8(lower, upper), words[1] = _mm512_unpackhi_epi8(lower, upper);
    return special;
}

// Calls `each` with the index of every 64 of `count` inputs and the mask of those that are there: all, or 32.
template <typename Each>
LOWBIT_INLINE void for_pairs_of_registers(int64_t count, Each each) {
    int64_t i = 0;
    for (; i + 2 * kWords <= count; i += 2 * kWords) each(i, ~__mmask64{0});
    if (i < count) each(i, __mmask64{0xffffffff});
}

// Both bytes of the bfloat16 that an integer of up to 7 bits is.
struct Int8Tables {
    alignas(64) uint8_t upper[128] = {}, lower[128] = {};
    constexpr Int8Tables() {
        for (int i = 1; i < 128; ++i) {
            int log = 0;
            while (i >> (log + 1)) ++log;
            const int bits = (127 + log) << 7 | ((i << (7 - log)) & 0x7f);
            upper[i] = static_cast<uint8_t>(bits >> 8), lower[i] = static_cast<uint8_t>(bits & 0xff);
        }
    }
};
constexpr Int8Tables kInt8;

LOWBIT_INLINE __m512i look_up_128(__m512i indices, const uint8_t* table) {
    return _mm512_permutex2var_epi8(_mm512_load_si512(table), indices, _mm512_load_si512(table + 64));
}

// 64 int8 -> bfloat16.
LOWBIT_INLINE void widen_int8(__m512i codes, __m512i (&words)[2]) {
    codes = _mm512_permutexvar_epi64(_mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7), codes);  // so that pairs of bytes are in order
    const __m512i sign = _mm512_set1_epi8(static_cast<char>(0x80)), magnitude = _mm512_abs_epi8(codes);
    const __m512i lower = look_up_128(magnitude, kInt8.lower);
    __m512i upper = look_up_128(magnitude, kInt8.upper);
    upper = _mm512_mask_mov_epi8(upper, _mm512_cmpeq_epi8_mask(codes, sign), _mm512_set1_epi8(0x43));  // 128, found as 0
    upper = _mm512_or_si512(upper, _mm512_and_si512(codes, sign));
    words[0] = _mm512_unpacklo_epi8(lower, upper), words[1] = _mm512_unpackhi_epi8(lower, upper);
}

// Codes as they are, for scales of whole channels: the sums are multiplied with them.
template <typename Code>
LOWBIT_INLINE void decode_unscaled(const void* weight, int64_t channel, int64_t first, int64_t count, BFloat16* output) {
    const auto& job = *static_cast<const WeightJob*>(weight);
    const auto* codes = static_cast<const uint8_t*>(job.weight) + channel * job.depth + first;
    for_pairs_of_registers(count, [=](int64_t i, __mmask64 mask) LOWBIT_INLINE_LAMBDA {
        __m512i words[2];
        const __m512i bytes = _mm512_maskz_loadu_epi8(mask, codes + i);
        if constexpr (std::is_same<Code, Int8>::value) widen_int8(bytes, words);
        else widen_e4m3(bytes, words);
        _mm512_storeu_si512(output + i, words[0]);
        if (mask >> kWords) _mm512_storeu_si512(output + i + kWords, words[1]);
    });
}

// E4M3 as it is, for scales of blocks of 128 by 128, which sums of 128 inputs are multiplied with.
struct BlockE4M3 {
    static constexpr int64_t kScaledInputs = 128;
    const WeightJob& job;
    int64_t per_row;

    explicit BlockE4M3(const void* weight)
        : job(*static_cast<const WeightJob*>(weight)), per_row(blocks(job.depth, kScaledInputs)) {}

    void operator()(int64_t channel, int64_t first, int64_t count, BFloat16* output) const {
        decode_unscaled<E4M3>(&job, channel, first, count, output);
    }

    float scale(int64_t channel, int64_t input) const {
        return static_cast<const float*>(job.scale)[channel / kScaledInputs * per_row + input / kScaledInputs];
    }
};

// Words times a power of two, in their exponents; of words that might be none zero stays zero.
LOWBIT_INLINE __m512i times_power(__m512i words, __m512i power, bool may_be_zero) {
    if (!may_be_zero) return _mm512_add_epi16(words, power);
    return _mm512_mask_add_epi16(words, _mm512_test_epi16_mask(words, _mm512_set1_epi16(0x7fff)), words, power);
}

// E4M3 in blocks of 32 inputs with scales of E8M0.
LOWBIT_INLINE void decode_mxfp8(const void* weight, int64_t channel, int64_t first, int64_t count, BFloat16* output) {
    const auto& job = *static_cast<const WeightJob*>(weight);
    for (int64_t done = 0; done < count; done += base::kChunk) {
        const int64_t part = smaller(base::kChunk, count - done), at = channel * job.depth + first + done;
        const auto* scales = static_cast<const uint8_t*>(job.scale) + at / kWords;
        const auto* codes = static_cast<const uint8_t*>(job.weight) + at;
        BFloat16* to = output + done;
        bool has_nan = false;
        for_pairs_of_registers(part, [&](int64_t i, __mmask64 mask) LOWBIT_INLINE_LAMBDA {
            const __m512i bytes = _mm512_maskz_loadu_epi8(mask, codes + i);
            __m512i words[2];
            const bool is_special = widen_e4m3(bytes, words);
            if (is_special)
                has_nan |= _mm512_cmpeq_epi8_mask(_mm512_and_si512(bytes, _mm512_set1_epi8(0x7f)), _mm512_set1_epi8(0x7f)) != 0;
            _mm512_storeu_si512(to + i, times_power(words[0], power_of(scales[i / kWords]), is_special));
            if (mask >> kWords)
                _mm512_storeu_si512(to + i + kWords, times_power(words[1], power_of(scales[i / kWords + 1]), is_special));
        });
        if (!are_near(scales, part / kWords) || has_nan) decode_slowly<E4M3>(job, channel, first + done, part, to);
    }
}

template <typename Code>
LOWBIT_INLINE __m512i join(Code, __m512 low, __m512 high) {
    return round_pair(low, high);
}

// decode_chunk gives of each 32 inputs of int4 the even ones first.
LOWBIT_INLINE __m512i join(Int4, __m512 even, __m512 odd) {
    const __m512i words = round_pair(even, odd);
    const __m512i wide_even = _mm512_cvtepu16_epi32(_mm512_castsi512_si256(words));
    const __m512i wide_odd = _mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(words, 1));
    return _mm512_or_si512(wide_even, _mm512_slli_epi32(wide_odd, 16));
}

// Through float32, for what the others are not made for.
template <typename Code>
void decode_any(const void* weight, int64_t channel, int64_t first, int64_t count, BFloat16* output) {
    const auto& job = *static_cast<const WeightJob*>(weight);
    alignas(64) float values[base::kChunk];
    for (int64_t done = 0; done < count; done += base::kChunk) {
        const int64_t part = smaller(base::kChunk, count - done);
        base::decode_chunk(job, channel, first + done, part, values, Code{});
        for (int64_t i = 0; i < part; i += kWords)
            _mm512_storeu_si512(output + done + i, join(Code{}, _mm512_load_ps(values + i), _mm512_load_ps(values + i + 16)));
    }
}

template <typename Code>
ChannelKernels byte_decoder(const WeightJob& job) {
    const bool is_whole = job.depth % kWords == 0 && (job.block_columns % kWords == 0 || job.block_columns >= job.depth);
    const bool is_mx = job.scale_type == 2 && job.block_columns == 32 && job.block_rows == 1 && !job.outer_scale;
    if (!base::has_even_blocks(job)) return kSlowKernelsOf<decode_any<Code>>;
    if (!is_whole) return kSlowKernelsOf<decode_even<Code>>;
    if (job.zero_point) return kKernelsOf<Each<decode_bytes<Code, true>>>;
    if (std::is_same<Code, E4M3>::value && is_mx) return kKernelsOf<Each<decode_mxfp8>>;
    if (has_channel_scales(job)) return kKernelsOf<Each<decode_unscaled<Code>>>;
    constexpr int64_t kBlock = BlockE4M3::kScaledInputs;
    const bool are_blocks = job.scale_type == 0 && job.block_columns == kBlock && job.block_rows == kBlock && !job.outer_scale;
    if (std::is_same<Code, E4M3>::value && are_blocks)
        return {kKernelsOf<Each<decode_bytes<Code, false>>>.decode, multiply_few_rows<BlockE4M3>};
    return kKernelsOf<Each<decode_bytes<Code, false>>>;
}

template <typename Scale, bool kHasZero>
ChannelKernels int4_decoder(const WeightJob& job) {
    if (job.block_columns == 64 && job.depth % 64 == 0) return kKernelsOf<Each<decode_int4<Scale, 64, kHasZero>>>;
    if (job.block_columns == 128 && job.depth % 128 == 0) return kKernelsOf<Each<decode_int4<Scale, 128, kHasZero>>>;
    return kKernelsOf<Each<decode_int4<Scale, 0, kHasZero>>>;
}

template <typename Scale>
ChannelKernels int4_decoder(const WeightJob& job) {
    return job.zero_point ? int4_decoder<Scale, true>(job) : int4_decoder<Scale, false>(job);
}

// Of groups that split_activations takes; in kNibbleOrder.
ChannelKernels group_decoder(Int4, const WeightJob& job) {
    return job.scale_type == 1 ? int4_decoder<BFloat16>(job) : int4_decoder<float>(job);
}

ChannelKernels group_decoder(E2M1, const WeightJob& job) {
    if (job.scale_type >= 2 && !job.outer_columns && job.block_columns == 16) return kKernelsOf<LookedUp<16>>;
    if (job.scale_type >= 2 && !job.outer_columns && job.block_columns == 32) return kKernelsOf<LookedUp<32>>;
    return job.scale_type == 2 && job.block_columns == 32 ? kKernelsOf<Each<decode_mxfp4>> : kSlowKernelsOf<decode_pairs>;
}

template <typename Code>
BFloat16Decoder weight_decoder(const WeightJob& job) {
    constexpr int64_t kBits = base::kBits<Code>;
    const uint16_t* order = nullptr;
    ChannelKernels kernels;
    if constexpr (kBits == 8) kernels = byte_decoder<Code>(job);
    else if (base::has_whole_groups<Code>(job)) kernels = group_decoder(Code{}, job), order = kNibbleOrder;
    else kernels = kSlowKernelsOf<decode_any<Code>>;
    bool leaves_scales = false;
    if constexpr (kBits == 8) leaves_scales = kernels.decode == kKernelsOf<Each<decode_unscaled<Code>>>.decode;
    return {kernels.decode,
            kernels.multiply_few_rows,
            order,
            job.weight,
            job.depth * kBits / 8,
            32 * kBits,
            leaves_scales ? channel_scales(job) : nullptr};
}

LOWBIT_END
#endif  // LOWBIT_NATIVE_KERNELS_BFLOAT16_DECODE_H
