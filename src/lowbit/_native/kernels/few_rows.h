// Up to four rows times 8- or 4-bit weights, decoded in registers 32 inputs at a time; AVX-512.
//
// Here decoding is most of the work, so that every instruction counts: a block's codes are multiplied and summed before
// its scale is, once; and of two 4-bit codes in a byte the lower ones are looked up in one register and the upper ones in
// another, with the activations in that order (of each 32 the even ones, then the odd ones).
//
// More rows by 4-bit codes are multiplied as weight_only.h does; what fills its cache, decode_pairs, is here too.
#ifndef LOWBIT_NATIVE_KERNELS_FEW_ROWS_H
#define LOWBIT_NATIVE_KERNELS_FEW_ROWS_H

#include "weight_codes.h"
#include "../runtime.h"

#ifdef LOWBIT_AVX512
LOWBIT_BEGIN(base)

constexpr int64_t kDirectRows = 4;
constexpr int64_t kGroup = 32;  // inputs decoded at a time

// What the 16 codes stand for, less the zero point; of 8-bit codes unused.
template <typename Code>
LOWBIT_INLINE Lanes table_of(Code, float) {
    return zero_lanes();
}
LOWBIT_INLINE Lanes table_of(E2M1, float) {
    return _mm512_setr_ps(0.0f, 0.5f, 1.0f, 1.5f, 2.0f, 3.0f, 4.0f, 6.0f, -0.0f, -0.5f, -1.0f, -1.5f, -2.0f, -3.0f, -4.0f, -6.0f);
}
LOWBIT_INLINE Lanes table_of(Int4, float zero) {
    const Lanes code = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    return _mm512_sub_ps(code, _mm512_set1_ps(zero));
}

// Of two codes in a byte.
template <typename Code>
LOWBIT_INLINE void decode_group(const Code* codes, Lanes table, __m256i&, Lanes* values) {
    const __m512i pairs = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)));
    values[0] = _mm512_permutexvar_ps(pairs, table);
    values[1] = _mm512_permutexvar_ps(_mm512_srli_epi32(pairs, 4), table);
}

LOWBIT_INLINE void decode_group(const Int8* codes, Lanes, __m256i&, Lanes* values) {
    for (int i = 0; i < 2; ++i) {
        const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes) + i);
        values[i] = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes));
    }
}

// As decode_as_half, without its factor of 256; keeps the largest magnitude, by which a NaN is known.
LOWBIT_INLINE void decode_group(const E4M3* codes, Lanes, __m256i& largest, Lanes* values) {
    const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes));
    largest = _mm256_max_epu8(largest, _mm256_and_si256(bytes, _mm256_set1_epi8(0x7f)));
    const __m512i half =
        _mm512_and_si512(_mm512_slli_epi16(_mm512_cvtepi8_epi16(bytes), 7), _mm512_set1_epi16(static_cast<int16_t>(0xbf80)));
    values[0] = _mm512_cvtph_ps(_mm512_castsi512_si256(half));
    values[1] = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(half, 1));
}

// The scales of the blocks of a chunk of a channel, and of int4 the zero points.
struct BlockScales {
    float scales[kChunk / 16], zeros[kChunk / kGroup];
};

// Not inlined: the same for every size of block.
template <typename Code>
LOWBIT_NOINLINE void load_block_scales(const WeightJob& job, int64_t channel, int64_t first, int64_t number, BlockScales& to) {
    const int64_t per_row = quotient_up(job.depth, job.block_columns);
    const int64_t index = quotient(channel, job.block_rows) * per_row + quotient(first, job.block_columns);
    load_scales(job, index, number, to.scales);
    if (job.outer_scale) {
        const Lanes outer = _mm512_set1_ps(outer_scale_at(job, channel, first));
        for (int64_t i = 0; i < number; i += kStep) store_lanes(to.scales + i, _mm512_mul_ps(load_lanes(to.scales + i), outer));
    }
    if (!std::is_same<Code, Int4>::value) return;
    for (int64_t i = 0; i < number; i += kStep) {
        const auto mask = static_cast<__mmask16>(number - i >= kStep ? 0xffff : (1u << (number - i)) - 1);
        __m512 zeros = _mm512_set1_ps(8.0f);
        const auto* from = static_cast<const uint8_t*>(job.zero_point) + index + i;
        if (job.zero_point) zeros = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(mask, from)));
        store_lanes(to.zeros + i, zeros);
    }
}

// Sums [channels][rows], and whether a channel holds a NaN, to the output. Not inlined: the same for every weight.
[[maybe_unused]] LOWBIT_NOINLINE void write_lanes(const WeightJob& job, const Lanes* sums, const int64_t* channels,
                                                  const bool* have_nan, int64_t count, int64_t rows) {
    for (int64_t c = 0; c < count; ++c) {
        const float poison = have_nan[c] ? as_float(0x7fc00000u) : 0.0f;
        for (int64_t row = 0; row < rows; ++row) write_result(job, row, channels[c], total(sums[c * rows + row]) + poison);
    }
}

// Some output channels of Rows rows x. Block: inputs with one scale, or 0: any multiple of 32.
template <typename Code, int Rows, int Channels, int Block>
LOWBIT_INLINE void multiply_channels(const WeightJob& job, const int64_t (&channels)[Channels]) {
    Lanes sums[Channels][Rows];
    __m256i largest[Channels];
    const Code* codes[Channels];
    BlockScales scales[Channels];
    for (int c = 0; c < Channels; ++c) {
        for (int row = 0; row < Rows; ++row) sums[c][row] = zero_lanes();
        largest[c] = _mm256_setzero_si256();
        codes[c] = channel_codes<Code>(job, channels[c]);
    }
    const int64_t row_bytes = job.depth * kBits<Code> / 8;
    for (int64_t first = 0; first < job.depth; first += kChunk) {
        const int64_t count = smaller(kChunk, job.depth - first);
        const int64_t block = Block ? Block : smaller(job.block_columns, count), step = Block == 16 ? kGroup : block;
        for (int c = 0; c < Channels; ++c) {
            load_block_scales<Code>(job, channels[c], first, blocks(count, block), scales[c]);
            const char* next = reinterpret_cast<const char*>(codes[c]) + Channels * row_bytes;
            for (int64_t i = 0; i < count * kBits<Code> / 8; i += 64) __builtin_prefetch(next + i);
        }
        for (int64_t i = 0, at = 0; i < count; i += step, at += Block == 16 ? 2 : 1) {
            Lanes parts[Channels][Rows], tables[Channels];
            for (int c = 0; c < Channels; ++c) {
                tables[c] = table_of(Code{}, scales[c].zeros[Block == 16 ? 0 : at]);
                for (int row = 0; row < Rows; ++row) parts[c][row] = zero_lanes();
            }
            for (int64_t j = i; j < i + (Block ? kGroup : block); j += kGroup) {
                for (int c = 0; c < Channels; ++c) {
                    Lanes values[2];
                    decode_group(codes[c], tables[c], largest[c], values);
                    codes[c] += kGroup * kBits<Code> / 8;
                    for (int row = 0; row < Rows; ++row) {
                        const float* activations = job.x + row * job.x_stride + first + j;
                        parts[c][row] = multiply_add(load_lanes(activations), values[0], parts[c][row]);
                        parts[c][row] = multiply_add(load_lanes(activations + 16), values[1], parts[c][row]);
                    }
                }
            }
            for (int c = 0; c < Channels; ++c) {
                const float* scale = scales[c].scales + at;
                Lanes factor = _mm512_set1_ps(*scale);
                if (Block == 16) factor = _mm512_mask_mov_ps(factor, 0xff00, _mm512_set1_ps(scale[1]));
                for (int row = 0; row < Rows; ++row) {
                    Lanes part = parts[c][row];
                    if (std::is_same<Code, E4M3>::value) part = _mm512_mul_ps(part, _mm512_set1_ps(256.0f));
                    sums[c][row] = multiply_add(part, factor, sums[c][row]);
                }
            }
        }
    }
    bool have_nan[Channels];
    for (int c = 0; c < Channels; ++c)
        have_nan[c] =
            std::is_same<Code, E4M3>::value && _mm256_movemask_epi8(_mm256_cmpeq_epi8(largest[c], _mm256_set1_epi8(0x7f)));
    write_lanes(job, sums[0], channels, have_nan, Channels, Rows);
}

template <typename Code, int Rows, int Block>
void multiply_few_rows(const WeightJob& job, int64_t first, int64_t last) {
    constexpr int kChannels = Rows <= 2 ? 2 : 1;  // at a time, as registers allow
    for (; first < last; first += kChannels) {    // a last channel without a second is multiplied twice
        int64_t channels[kChannels];
        for (int c = 0; c < kChannels; ++c) channels[c] = smaller(first + c, last - 1);
        multiply_channels<Code, Rows, kChannels, Block>(job, channels);
    }
}

template <typename Code, int Block>
void multiply_blocks(const WeightJob& job, int64_t first, int64_t last) {
    switch (job.rows) {
        case 1: return multiply_few_rows<Code, 1, Block>(job, first, last);
        case 2: return multiply_few_rows<Code, 2, Block>(job, first, last);
        case 3: return multiply_few_rows<Code, 3, Block>(job, first, last);
        case 4: return multiply_few_rows<Code, 4, Block>(job, first, last);
    }
}

// Whether load_block_scales finds the scales of every chunk.
template <typename Code>
LOWBIT_INLINE bool has_whole_groups(const WeightJob& job) {
    const bool whole = job.block_columns >= job.depth || job.block_columns % kChunk == 0;
    const bool even = job.block_columns % kGroup == 0 && kChunk % job.block_columns == 0 && job.depth % job.block_columns == 0;
    const bool halves = kBits<Code> == 4 && job.block_columns == 16;
    return job.depth % kGroup == 0 && (whole || even || halves);
}

inline void split_activations(WeightJob& job) {
    if (!has_whole_groups<E2M1>(job)) return;
    float* const rows = scratch<float>(Slot::kSplitActivations, job.rows * job.depth);
    const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
    float* to = rows;
    for (int64_t row = 0; row < job.rows; ++row)
        for (int64_t i = 0; i < job.depth; i += kGroup, to += kGroup) {
            const Lanes low = load_lanes(job.x + row * job.x_stride + i), high = load_lanes(job.x + row * job.x_stride + i + 16);
            store_lanes(to, _mm512_permutex2var_ps(low, even, high));
            store_lanes(to + 16, _mm512_permutex2var_ps(low, odd, high));
        }
    job.x = rows, job.x_stride = job.depth, job.is_split = true;
}

// Inputs [first, first + count) of a channel, where a chunk begins, to output float32: the table is scaled, not the values.
template <typename Code, int Block>
LOWBIT_INLINE void decode_pairs(const WeightJob& job, int64_t channel, int64_t first, int64_t count, float* output) {
    BlockScales scales;
    const Code* codes = channel_codes<Code>(job, channel) + first / 2;
    const int64_t block = Block ? Block : smaller(job.block_columns, count), step = Block == 16 ? kGroup : block;
    load_block_scales<Code>(job, channel, first, blocks(count, block), scales);
    for (int64_t i = 0, at = 0; i < count; i += step, at += Block == 16 ? 2 : 1) {
        const float* scale = scales.scales + at;
        Lanes table = table_of(Code{}, scales.zeros[Block == 16 ? 0 : at]), factor = _mm512_set1_ps(*scale);
        if (Block == 16) factor = _mm512_mask_mov_ps(factor, 0xff00, _mm512_set1_ps(scale[1]));
        else table = _mm512_mul_ps(table, factor);
        for (int64_t j = i; j < i + (Block ? kGroup : block); j += kGroup, codes += kGroup / 2) {
            Lanes values[2];
            __m256i unused;
            decode_group(codes, table, unused, values);
            for (int half = 0; half < 2; ++half)
                store_lanes(output + j + 16 * half, Block == 16 ? _mm512_mul_ps(values[half], factor) : values[half]);
        }
    }
}

template <typename Code>
LOWBIT_INLINE void decode_pairs(const WeightJob& job, int64_t channel, int64_t first, int64_t count, float* output) {
    if (!job.is_split || !has_whole_groups<Code>(job)) decode_chunk(job, channel, first, count, output, Code{});
    else if (job.block_columns == 16) decode_pairs<Code, 16>(job, channel, first, count, output);
    else if (job.block_columns == kGroup) decode_pairs<Code, kGroup>(job, channel, first, count, output);
    else decode_pairs<Code, 0>(job, channel, first, count, output);
}

LOWBIT_INLINE void decode_to(const WeightJob& job, int64_t channel, int64_t first, int64_t count, float* output, Int4) {
    decode_pairs<Int4>(job, channel, first, count, output);
}

LOWBIT_INLINE void decode_to(const WeightJob& job, int64_t channel, int64_t first, int64_t count, float* output, E2M1) {
    decode_pairs<E2M1>(job, channel, first, count, output);
}

// Multiplies groups [first, last) of kTaskChannels output channels, or returns false for what it is not made for.
template <typename Code>
bool multiply_direct(const WeightJob& job, int64_t first, int64_t last) {
    if (job.rows > kDirectRows || !has_whole_groups<Code>(job)) return false;
    first *= kTaskChannels, last = smaller(last * kTaskChannels, job.columns);
    if (kBits<Code> == 4 && job.block_columns == 16) multiply_blocks<Code, 16>(job, first, last);
    else if (job.block_columns == kGroup) multiply_blocks<Code, kGroup>(job, first, last);
    else multiply_blocks<Code, 0>(job, first, last);
    return true;
}

LOWBIT_END
#endif
#endif  // LOWBIT_NATIVE_KERNELS_FEW_ROWS_H
