// Products of few rows of bfloat16 with weights that are decoded to it, by AMX; their time is that of decoding.
//
// The roles of amx_product.h are exchanged: a tile's rows are channels. Of a group of channels kFewInputs inputs are decoded
// into the first-level cache while those before are multiplied. Groups are as wide as the tiles allow: 32 channels with up to
// 32 rows, 16 with up to 64, so that activations, which come from the second-level cache, are loaded less often.
#ifndef LOWBIT_NATIVE_KERNELS_AMX_FEW_ROWS_H
#define LOWBIT_NATIVE_KERNELS_AMX_FEW_ROWS_H

#include "amx_product.h"

LOWBIT_BEGIN(gemm)

// Rows of a tile: 16, or as many as there are where those are fewer, so that they are found in the first-level cache.
LOWBIT_INLINE int64_t rows_of_tile(const GemmArgs& job) { return smaller(job.rows, kTileRows); }

LOWBIT_INLINE int64_t bytes_of_step(const GemmArgs& job) { return blocks(job.rows, kTileRows) * rows_of_tile(job) * kStep; }

inline int64_t channels_of_group(int64_t rows) { return rows <= 2 * kTileRows ? 2 * kTileChannels : kTileChannels; }

// Steps [first, last) of 32 inputs -> tiles [steps][blocks of rows][16 pairs of inputs][rows of a tile][2].
void transpose_rows(const GemmArgs& job, int64_t first, int64_t last) {
    const int64_t pair_bytes = rows_of_tile(job) * 4;
    const __mmask16 columns = column_mask(rows_of_tile(job));
    uint8_t* to = job.tiles + first * bytes_of_step(job);
    for (int64_t step = first; step < last; ++step) {
        for (int64_t row = 0; row < job.rows; row += kTileRows) {
            alignas(64) int8_t turned[kTileRows * kStep];
            turn_step(job, step, row, turned);
            for (int64_t pair = 0; pair < 16; ++pair, to += pair_bytes)
                _mm512_mask_storeu_epi32(to, columns, _mm512_load_si512(turned + pair * kStep));
        }
    }
}

using DecodedChannels = BFloat16[2 * kTileChannels][kStride];

struct FewRowsMemory {
    alignas(64) DecodedChannels decoded[2];
    alignas(64) float sums[4][kTileRows * kTileChannels];
    alignas(64) float scaled[4][kTileRows * kTileChannels];
};

// Sums and activations have a column for each row; fewer than 16 are multiplied by multiply_low alone.
LOWBIT_INLINE void configure_tiles(int64_t rows) {
    TileShape shape;
    for (int tile : {0, 2, 6}) shape.row_bytes[tile] = static_cast<uint16_t>(4 * rows);
    __asm__ volatile("" : : "r"(&shape) : "memory");  // the intrinsic does not say how much of it is read
    _tile_loadconfig(&shape);
}

// A step of decoded channels times x is added in phases, so that others of decoding come between: instructions that load tiles
// hold up what follows at once. Phases are 0 ... the number of channels that are decoded within a step.

// Up to 16 rows and 32 channels: adds to tiles 0 and 2, of the first and the next 16 channels. Of more than eight rows there are
// more activations than fit into the first-level cache; they are loaded past it.
LOWBIT_INLINE void multiply_low(int phase, const BFloat16* channels, const uint8_t* x, int64_t rows) {
    if (phase == 0) {
        _tile_loadd(4, channels, kChannelBytes);
    } else if (phase == 1) {
        if (rows > kTileRows / 2) _tile_stream_loadd(6, x, 4 * rows);
        else _tile_loadd(6, x, 4 * rows);
    } else if (phase == 2) {
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(5, channels + kTileChannels * kStride, kChannelBytes);
    } else if (phase == 4) {
        _tile_dpbf16ps(2, 5, 6);
    }
}

// Up to 32 rows and 32 channels: adds to tiles 0 ... 3, of the first 16 rows, of the others, of the next 16 channels likewise.
LOWBIT_INLINE void multiply_square(int phase, const BFloat16* channels, const uint8_t* x) {
    if (phase == 0) {
        _tile_loadd(4, channels, kChannelBytes);
        _tile_stream_loadd(6, x, kStep);
    } else if (phase == 1) {
        _tile_dpbf16ps(0, 4, 6);
        _tile_stream_loadd(7, x + kTileBytes, kStep);
    } else if (phase == 2) {
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(5, channels + kTileChannels * kStride, kChannelBytes);
    } else if (phase == 3) {
        _tile_dpbf16ps(2, 5, 6);
    } else {
        _tile_dpbf16ps(3, 5, 7);
    }
}

// Up to 64 rows and 16 channels: adds to a tile for each 16 rows.
LOWBIT_INLINE void multiply_high(int phase, const BFloat16* channels, const uint8_t* x, bool are_four) {
    if (phase == 0) {
        _tile_loadd(4, channels, kChannelBytes);
        _tile_stream_loadd(5, x, kStep);
    } else if (phase == 1) {
        _tile_dpbf16ps(0, 4, 5);
        _tile_stream_loadd(6, x + kTileBytes, kStep);
        _tile_dpbf16ps(1, 4, 6);
        _tile_stream_loadd(7, x + 2 * kTileBytes, kStep);
    } else {
        _tile_dpbf16ps(2, 4, 7);
        if (!are_four) return;
        _tile_stream_loadd(5, x + 3 * kTileBytes, kStep);
        _tile_dpbf16ps(3, 4, 5);
    }
}

LOWBIT_INLINE void zero_sums() {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
}

template <typename Sum>
LOWBIT_INLINE void store_sums(Sum (*sums)[kTileRows * kTileChannels]) {
    _tile_stored(0, sums[0], 64);
    _tile_stored(1, sums[1], 64);
    _tile_stored(2, sums[2], 64);
    _tile_stored(3, sums[3], 64);
    __asm__ volatile("" ::: "memory");
}

// Adds what was summed, times its scale, to what was before, or to zero; the sums begin anew.
LOWBIT_INLINE void add_scaled(FewRowsMemory& memory, float scale, bool accumulate) {
    store_sums(memory.sums);
    zero_sums();
    float *from = memory.sums[0], *to = memory.scaled[0];
    for (int64_t i = 0; i < 4 * kTileRows * kTileChannels; i += 16) {
        const __m512 before = accumulate ? _mm512_load_ps(to + i) : _mm512_setzero_ps();
        _mm512_store_ps(to + i, _mm512_fmadd_ps(_mm512_load_ps(from + i), _mm512_set1_ps(scale), before));
    }
}

template <int64_t kChannels>
LOWBIT_INLINE void write_sums(const GemmArgs& job, float (*sums)[kTileRows * kTileChannels], int64_t column) {
    for (int64_t row = 0, block = 0; row < job.rows; row += kTileRows, ++block) {
        write_transposed(job, sums[block], row, column);
        if (kChannels > kTileChannels && column + kTileChannels < job.columns)
            write_transposed(job, sums[2 + block], row, column + kTileChannels);
    }
}

template <int64_t kChannels>
constexpr int64_t kChannelsOfStep = kChannels / kSteps;  // are decoded

template <int64_t kChannels>
LOWBIT_INLINE void multiply_phase(int phase, const BFloat16* channels, const uint8_t* x, int64_t rows) {
    if (kChannels == kTileChannels) multiply_high(phase, channels, x, rows > 3 * kTileRows);
    else if (rows <= kTileRows) multiply_low(phase, channels, x, rows);
    else multiply_square(phase, channels, x);
}

template <int64_t kChannels>
LOWBIT_INLINE void multiply_step(const BFloat16* channels, const uint8_t* x, int64_t rows) {
#pragma GCC unroll 5
    for (int phase = 0; phase <= kChannelsOfStep<kChannels>; ++phase) multiply_phase<kChannels>(phase, channels, x, rows);
}

// Adds what the low-rank product adds to the channels from `channel` on; `copied` is for a part of them.
template <int64_t kChannels>
LOWBIT_NOINLINE void add_low_rank(const GemmArgs& job, int64_t channel, DecodedChannels& copied) {
    for (int64_t step = 0; step * kWords < job.low_rank.rank; ++step) {
        for (int64_t i = 0; i < kChannels; ++i) _mm512_storeu_si512(copied[i], low_rank_inputs(job, channel + i, step));
        __asm__ volatile("" ::: "memory");  // the intrinsics do not say that they read it
        multiply_step<kChannels>(copied[0], job.low_rank.tiles + step * bytes_of_step(job), job.rows);
    }
}

// Groups [first, last) of kChannels, with all rows. `Channel` decodes inputs of a channel.
template <typename Channel, int64_t kChannels>
void multiply_groups(const GemmArgs& job, int64_t first, int64_t last) {
    constexpr int kDecoded = kChannelsOfStep<kChannels>;
    auto& memory = scratch_object<FewRowsMemory>(Slot::kFewRows);
    const auto decode = channel_of<Channel>(job);
    const int64_t step_bytes = bytes_of_step(job), row_bytes = job.decoder->row_bytes;
    const int64_t chunk_bytes = bytes_of(*job.decoder, kFewInputs);
    configure_tiles(rows_of_tile(job));
    Chunk chunk{last, 0}, next{first, 0};
    for (int64_t turn = 0; chunk.group < last || next.group < last; turn ^= 1) {
        const Chunk after = next_chunk(job, next, last);
        const int64_t inputs = smaller(kFewInputs, job.depth / 2 - chunk.input),
                      steps = chunk.group < last ? blocks(inputs, kWords) : 0;
        Part decoded = part_of(job, next, last, kChannels), asked = part_of(job, after, last, kChannels);
        const bool is_whole = decoded.is_whole(kChannels) && asked.is_whole(kChannels);
        const char* codes = codes_at(*job.decoder, asked.channel, asked.input);
        const BFloat16* from = memory.decoded[turn][0];
        const uint8_t* x = job.tiles + chunk.input / kWords * step_bytes;
        BFloat16* to = memory.decoded[turn ^ 1][0];
        if (chunk.input == 0) zero_sums();
        __asm__ volatile("" ::: "memory");  // the intrinsics do not say that they read it
        for (int64_t step = 0; step < kSteps; ++step, from += kWords, x += step_bytes) {
            if (is_whole && step < steps) {
#pragma GCC unroll 4
                for (int i = 0; i < kDecoded; ++i, codes += row_bytes) {
                    multiply_phase<kChannels>(i, from, x, job.rows);
                    prefetch_lines(codes, chunk_bytes);
                    decode(decoded.channel + i, decoded.input, kFewInputs, to + i * kStride);
                }
                multiply_phase<kChannels>(kDecoded, from, x, job.rows);
            } else {
                if (step < steps) multiply_step<kChannels>(from, x, job.rows);
                decode_part(job, decoded, asked, kDecoded, part_decoder<Channel>(job), to);
            }
            decoded.channel += kDecoded, asked.channel += kDecoded;
            to += kDecoded * kStride;
            if constexpr (Channel::kScaledInputs > 0) {
                constexpr int64_t kScaledSteps = Channel::kScaledInputs / kWords;
                if (step < steps && ((step + 1) % kScaledSteps == 0 || step + 1 == steps)) {
                    const int64_t input = chunk.input + step * kWords;
                    add_scaled(memory, decode.scale(chunk.group * kChannels, input), input >= Channel::kScaledInputs);
                }
            }
        }
        if (chunk.group < last && next.input == 0) {
            add_low_rank<kChannels>(job, chunk.group * kChannels, memory.decoded[turn]);
            if (Channel::kScaledInputs == 0) store_sums(memory.sums);
            write_sums<kChannels>(job, Channel::kScaledInputs ? memory.scaled : memory.sums, chunk.group * kChannels);
        }
        chunk = next, next = after;
    }
    _tile_release();
}

// Groups [first, last) of channels_of_group(rows).
template <typename Channel>
void multiply_few_rows(const GemmArgs& job, int64_t first, int64_t last) {
    const bool is_wide = channels_of_group(job.rows) > kTileChannels;
    is_wide ? multiply_groups<Channel, 2 * kTileChannels>(job, first, last)
            : multiply_groups<Channel, kTileChannels>(job, first, last);
}

LOWBIT_END
#endif  // LOWBIT_NATIVE_KERNELS_AMX_FEW_ROWS_H
