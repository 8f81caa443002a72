// Products of few rows of int8 with int8 weights by AMX, at the speed at which memory gives the weights.
//
// The roles of amx_product.h are exchanged: a tile's rows are 16 channels, which are read as they lie in a checkpoint. The
// activations, of which there are few, are transposed; so are the sums. Two tiles of channels are multiplied at once with up
// to 32 rows, one with up to 64, so that activations, which come from the second-level cache, are loaded less often.
#ifndef LOWBIT_NATIVE_KERNELS_AMX_INT8_FEW_ROWS_H
#define LOWBIT_NATIVE_KERNELS_AMX_INT8_FEW_ROWS_H

#include "amx_few_rows.h"

LOWBIT_BEGIN(gemm)

// Activations of bfloat16 become three rows each, of the bytes of integers of 22 bits and a power of two: what is lost is below
// 2**-22 of the largest of a row.

struct FewInt8 {
    static constexpr bool is_gated = false, is_split = false;
};

struct FewGatedInt8 : FewInt8 {  // the two tiles of channels are one of each weight
    static constexpr bool is_gated = true;
};

struct FewSplitInt8 : FewInt8 {  // the rows are those of the first bytes, of the second, of the third
    static constexpr bool is_split = true;
};

constexpr int64_t kBytesOfASplit = 3;
constexpr int kSplitBits = 21;  // of the first power of two in a row

constexpr int64_t kChunkSteps = 4;  // whose weights are asked of memory together

struct FewInt8Memory {
    alignas(64) int32_t sums[4][kTileRows * kTileChannels];
    alignas(64) int8_t rest[2][kTileBytes];  // the last inputs, with zeros behind
};

// 16 channels of one weight.
struct ChannelTile {
    const int8_t* weight;
    int64_t channel;
};

// What is multiplied at once; the second is not there with more than 32 rows.
template <typename Kind>
LOWBIT_INLINE void channels_of(const GemmArgs& job, int64_t group, bool are_two, ChannelTile (&tiles)[2]) {
    const int64_t channel = group * (are_two && !Kind::is_gated ? 2 : 1) * kTileChannels;
    const int64_t second = Kind::is_gated ? channel : channel + kTileChannels;
    const auto* weight = static_cast<const int8_t*>(job.weight.data);
    const auto* other = Kind::is_gated ? static_cast<const int8_t*>(job.gated.data) : weight;
    tiles[0] = {weight + channel * job.depth, channel};
    tiles[1] = second < job.columns ? ChannelTile{other + second * job.depth, second} : tiles[0];
}

// Part `step` of a chunk's channels, from input `first` on.
LOWBIT_INLINE void ask_for(const GemmArgs& job, const ChannelTile& tile, int64_t first, int64_t step) {
    constexpr int64_t kChannels = kTileChannels / kChunkSteps;
    const int8_t* from = tile.weight + step * kChannels * job.depth + first;
    const int64_t bytes = smaller(kChunkSteps * kStep, job.depth - first);
#pragma GCC unroll 4
    for (int64_t i = 0; i < kChannels; ++i) prefetch_lines(reinterpret_cast<const char*>(from + i * job.depth), bytes);
}

// 64 inputs of 16 or 32 channels, `stride` bytes apart, times x.
LOWBIT_INLINE void multiply_channels(const int8_t* first, const int8_t* second, int64_t stride, const uint8_t* x, int64_t rows) {
    if (rows <= kTileRows) {
        _tile_loadd(6, x, 4 * rows);
        _tile_loadd(4, first, stride);
        _tile_dpbssd(0, 4, 6);
        _tile_loadd(5, second, stride);
        _tile_dpbssd(2, 5, 6);
    } else if (rows <= 2 * kTileRows) {
        _tile_loadd(4, first, stride);
        _tile_stream_loadd(6, x, kStep);
        _tile_dpbssd(0, 4, 6);
        _tile_stream_loadd(7, x + kTileBytes, kStep);
        _tile_dpbssd(1, 4, 7);
        _tile_loadd(5, second, stride);
        _tile_dpbssd(2, 5, 6);
        _tile_dpbssd(3, 5, 7);
    } else {
        _tile_loadd(4, first, stride);
        _tile_stream_loadd(5, x, kStep);
        _tile_dpbssd(0, 4, 5);
        _tile_stream_loadd(6, x + kTileBytes, kStep);
        _tile_dpbssd(1, 4, 6);
        _tile_stream_loadd(7, x + 2 * kTileBytes, kStep);
        _tile_dpbssd(2, 4, 7);
        if (rows <= 3 * kTileRows) return;
        _tile_stream_loadd(5, x + 3 * kTileBytes, kStep);
        _tile_dpbssd(3, 4, 5);
    }
}

// The last inputs of 16 channels -> 64 of each.
LOWBIT_INLINE void copy_rest(const GemmArgs& job, const ChannelTile& tile, int64_t first, int8_t* rest) {
    for (int64_t i = 0; i < kTileChannels; ++i)
        _mm512_store_si512(rest + i * kStep,
                           _mm512_maskz_loadu_epi8(present(first, job.depth), tile.weight + i * job.depth + first));
}

LOWBIT_INLINE __m512 scaled(const int32_t* sums, float row_scale, const TileWeight& weight, int64_t channel) {
    const __m512 value = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_load_si512(sums)), _mm512_set1_ps(row_scale));
    const __m512 result = _mm512_mul_ps(value, _mm512_loadu_ps(weight.column_scale + channel));
    return weight.bias ? _mm512_add_ps(result, _mm512_loadu_ps(weight.bias + channel)) : result;
}

// Sums [16 channels][16 rows] of one tile of channels, or of one of each weight -> output [rows][channels].
template <typename Kind, typename Output>
LOWBIT_INLINE void write_few(const GemmArgs& job, const int32_t* sums, const int32_t* gated, int64_t row, int64_t channel) {
    alignas(64) int32_t turned[2][kTileRows * kTileChannels];
    pack_step(reinterpret_cast<const int8_t*>(sums), kStep, ~__mmask64{0}, reinterpret_cast<int8_t*>(turned[0]));
    if (Kind::is_gated)
        pack_step(reinterpret_cast<const int8_t*>(gated), kStep, ~__mmask64{0}, reinterpret_cast<int8_t*>(turned[1]));
    auto* to = static_cast<Output*>(job.output) + row * job.columns + channel;
    for (int64_t i = 0; i < smaller(kTileRows, job.rows - row); ++i, to += job.columns) {
        __m512 value = scaled(turned[0] + i * kTileChannels, job.row_scale[row + i], job.weight, channel);
        if (Kind::is_gated)
            value = _mm512_mul_ps(base::silu(value),
                                  scaled(turned[1] + i * kTileChannels, job.row_scale[row + i], job.gated, channel));
        store_narrow(to, 0xffff, value);
    }
}

// Sums [16 channels][16 rows] of each block of rows -> output [rows][channels].
template <typename Output>
LOWBIT_INLINE void write_split(const GemmArgs& job, const int32_t (*sums)[kTileRows * kTileChannels], int64_t channel) {
    alignas(64) int32_t turned[4 * kTileRows * kTileChannels];
    for (int64_t block = 0; block * kTileRows < job.rows; ++block)
        pack_step(reinterpret_cast<const int8_t*>(sums[block]), kStep, ~__mmask64{0},
                  reinterpret_cast<int8_t*>(turned + block * kTileRows * kTileChannels));
    const int64_t rows = job.rows / kBytesOfASplit;
    const auto part = [&](int64_t i, int64_t row) LOWBIT_INLINE_LAMBDA {
        return _mm512_cvtepi32_ps(_mm512_load_si512(turned + (i * rows + row) * kTileChannels));
    };
    const __m512 byte = _mm512_set1_ps(256.0f);
    const __m512 scale = _mm512_loadu_ps(job.weight.column_scale + channel);
    const __m512 bias = job.weight.bias ? _mm512_loadu_ps(job.weight.bias + channel) : _mm512_setzero_ps();
    auto* to = static_cast<Output*>(job.output) + channel;
    for (int64_t row = 0; row < rows; ++row, to += job.columns) {
        const __m512 sum = _mm512_fmadd_ps(_mm512_fmadd_ps(part(0, row), byte, part(1, row)), byte, part(2, row));
        const __m512 value = _mm512_mul_ps(_mm512_mul_ps(sum, scale), _mm512_set1_ps(job.row_scale[row]));
        store_narrow(to, 0xffff, job.weight.bias ? _mm512_add_ps(value, bias) : value);
    }
}

// Rows [first, last) of x -> three rows each of `codes`, and their scales; NaN of rows that are not finite.
void split_rows_to_bytes(const SplitJob& job, int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) {
        const BFloat16* x = job.x + row * job.stride;
        const uint32_t largest = base::largest(x, job.depth, 0);
        const bool is_finite = largest < 0x7f80u;
        int exponent = static_cast<int>(largest >> 7) - kSplitBits;
        exponent = exponent < 1 ? 1 : exponent;  // of rows so small what is below the smallest normal number is lost
        job.row_scale[row] =
            is_finite ? as_float(static_cast<uint32_t>(exponent) << 23) : std::numeric_limits<float>::quiet_NaN();
        const __m512 inverse = _mm512_set1_ps(is_finite ? as_float(static_cast<uint32_t>(254 - exponent) << 23) : 0.0f);
        int8_t* to[kBytesOfASplit];
        for (int64_t i = 0; i < kBytesOfASplit; ++i) to[i] = job.codes + (i * job.rows + row) * job.depth;
        for (int64_t i = 0; i < job.depth; i += 16) {
            const __mmask16 mask = column_mask(job.depth - i);
            const __m512i words = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, x + i));
            __m512i value = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_castsi512_ps(_mm512_slli_epi32(words, 16)), inverse));
            if (!is_finite) value = _mm512_setzero_si512();
            for (int64_t j = kBytesOfASplit - 1; j >= 0; --j) {
                _mm512_mask_cvtepi32_storeu_epi8(to[j] + i, mask, value);
                value = _mm512_srai_epi32(_mm512_add_epi32(value, _mm512_set1_epi32(128)), 8);
            }
        }
    }
}

template <typename Kind, typename Output>
LOWBIT_INLINE void write_channels(const GemmArgs& job, FewInt8Memory& memory, const ChannelTile (&tiles)[2], bool are_two) {
    const bool are_both = are_two && tiles[1].channel != tiles[0].channel;
    if constexpr (Kind::is_split) {
        write_split<Output>(job, memory.sums, tiles[0].channel);
        if (are_both) write_split<Output>(job, memory.sums + 2, tiles[1].channel);
    } else {
        for (int64_t row = 0, block = 0; row < job.rows; row += kTileRows, ++block) {
            write_few<Kind, Output>(job, memory.sums[block], memory.sums[2 + block % 2], row, tiles[0].channel);
            if (are_both) write_few<Kind, Output>(job, memory.sums[2 + block], nullptr, row, tiles[1].channel);
        }
    }
}

// Groups [first, last) of channels, as channels_of counts them, with all rows.
template <typename Kind, typename Output>
void multiply_few_int8(const GemmArgs& job, int64_t first, int64_t last) {
    auto& memory = scratch_object<FewInt8Memory>(Slot::kFewInt8);
    const int64_t step_bytes = bytes_of_step(job), chunk = kChunkSteps * kStep;
    const bool are_two = job.rows <= 2 * kTileRows;
    configure_tiles(rows_of_tile(job));
    ChannelTile tiles[2], next[2];
    channels_of<Kind>(job, first, are_two, tiles);
    for (int64_t group = first; group < last; ++group) {
        channels_of<Kind>(job, smaller(group + 1, last - 1), are_two, next);
        zero_sums();
        const uint8_t* x = job.tiles;
        for (int64_t input = 0; input < job.depth; input += chunk) {
            const bool is_last = input + chunk >= job.depth;
            const ChannelTile* asked = is_last ? next : tiles;
            for (int64_t step = 0; step < kChunkSteps; ++step) {
                const int64_t at = input + step * kStep, asked_at = is_last ? 0 : input + chunk;
                ask_for(job, asked[0], asked_at, step);
                if (are_two) ask_for(job, asked[1], asked_at, step);
                if (at + kStep <= job.depth) {
                    multiply_channels(tiles[0].weight + at, tiles[1].weight + at, job.depth, x, job.rows);
                } else if (at < job.depth) {
                    copy_rest(job, tiles[0], at, memory.rest[0]);
                    copy_rest(job, tiles[1], at, memory.rest[1]);
                    __asm__ volatile("" ::: "memory");  // the intrinsics do not say that they read it
                    multiply_channels(memory.rest[0], memory.rest[1], kStep, x, job.rows);
                }
                x += step_bytes;
            }
        }
        store_sums(memory.sums);
        write_channels<Kind, Output>(job, memory, tiles, are_two);
        tiles[0] = next[0], tiles[1] = next[1];
    }
    _tile_release();
}

constexpr TileKernel few_int8_products[2][3] = {
    {multiply_few_int8<FewInt8, float>, multiply_few_int8<FewInt8, BFloat16>, multiply_few_int8<FewInt8, Half>},
    {multiply_few_int8<FewGatedInt8, float>, multiply_few_int8<FewGatedInt8, BFloat16>, multiply_few_int8<FewGatedInt8, Half>}};
constexpr TileKernel few_split_product = multiply_few_int8<FewSplitInt8, BFloat16>;

LOWBIT_END
#endif  // LOWBIT_NATIVE_KERNELS_AMX_INT8_FEW_ROWS_H
