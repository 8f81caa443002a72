// Attention in float32: of the inputs as they are, or (kAttentionFp8) of e4m3 codes of them, decoded, with the softmax
// rounded to e4m3 too: the numbers of 8-bit floating point on a CPU that has no instruction for it.
#ifndef LOWBIT_NATIVE_KERNELS_ATTENTION_FLOAT32_H
#define LOWBIT_NATIVE_KERNELS_ATTENTION_FLOAT32_H

#include "attention.h"
#include "vector_tiles.h"

LOWBIT_BEGIN(vnni)

constexpr int64_t kFloatRows = 96;

// As Tile of vector_tiles.h, with strides of its own: as variables there they took 5% of the integer products' time.
struct FloatTile {
    const float* x;       // rows, x_stride apart
    const float* weight;  // [depth] steps of 16 columns a panel
    int64_t x_stride, panel_stride, step_stride, depth;
    float* sums;  // rows, sums_stride apart
    int64_t sums_stride;
    bool accumulate;
};

template <int Rows, int Panels>
void multiply_float_tile(const FloatTile& tile) {
    __m512 sums[Rows][Panels];
#pragma GCC unroll 8
    for (int row = 0; row < Rows; ++row)
#pragma GCC unroll 8
        for (int panel = 0; panel < Panels; ++panel)
            sums[row][panel] =
                tile.accumulate ? _mm512_load_ps(tile.sums + row * tile.sums_stride + 16 * panel) : _mm512_setzero_ps();
    const float* x[Rows];
#pragma GCC unroll 8
    for (int row = 0; row < Rows; ++row) x[row] = tile.x + row * tile.x_stride;
    const float* weight = tile.weight;
    for (int64_t i = 0; i < tile.depth; ++i, weight += tile.step_stride) {
        __m512 weights[Panels];
#pragma GCC unroll 8
        for (int panel = 0; panel < Panels; ++panel) weights[panel] = _mm512_load_ps(weight + panel * tile.panel_stride);
#pragma GCC unroll 8
        for (int row = 0; row < Rows; ++row) {
            const __m512 value = _mm512_set1_ps(x[row][i]);
#pragma GCC unroll 8
            for (int panel = 0; panel < Panels; ++panel)
                sums[row][panel] = _mm512_fmadd_ps(value, weights[panel], sums[row][panel]);
        }
    }
#pragma GCC unroll 8
    for (int row = 0; row < Rows; ++row)
#pragma GCC unroll 8
        for (int panel = 0; panel < Panels; ++panel)
            _mm512_store_ps(tile.sums + row * tile.sums_stride + 16 * panel, sums[row][panel]);
}

using MultiplyFloatTile = void (*)(const FloatTile&);

template <int Rows>
constexpr MultiplyFloatTile kFloatTilesOfRows[kVectorPanels] = {multiply_float_tile<Rows, 1>, multiply_float_tile<Rows, 2>,
                                                                multiply_float_tile<Rows, 3>, multiply_float_tile<Rows, 4>};
constexpr const MultiplyFloatTile* kFloatTiles[kVectorRows] = {kFloatTilesOfRows<1>, kFloatTilesOfRows<2>, kFloatTilesOfRows<3>,
                                                               kFloatTilesOfRows<4>, kFloatTilesOfRows<5>, kFloatTilesOfRows<6>};

LOWBIT_INLINE void multiply_float_rows(FloatTile tile, int64_t rows, int64_t panels) {
    for (int64_t row = 0; row < rows; row += kVectorRows) {
        kFloatTiles[smaller(kVectorRows, rows - row) - 1][panels - 1](tile);
        tile.x += kVectorRows * tile.x_stride;
        tile.sums += kVectorRows * tile.sums_stride;
    }
}

// To the nearest e4m3 value: |value| <= 448 up to a rounding error.
LOWBIT_INLINE float round_e4m3(float value) {
    E4M3 code;
    base::narrow(value, code);
    return base::widen(code);
}

// The same for 0 <= value <= 448.
LOWBIT_INLINE __m512 round_e4m3(__m512 value) {
    const __m512i bits = _mm512_castps_si512(value);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 20), _mm512_set1_epi32(1));
    const __m512i up = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7ffff)), odd);
    const __m512 normal = _mm512_castsi512_ps(_mm512_and_si512(up, _mm512_set1_epi32(static_cast<int>(0xfff00000u))));
    const __m512 shift = _mm512_set1_ps(16384.0f);  // whose last place is 2**-9, the unit below 2**-6
    const __m512 subnormal = _mm512_sub_ps(_mm512_add_ps(value, shift), shift);
    return _mm512_mask_mov_ps(normal, _mm512_cmp_ps_mask(value, _mm512_set1_ps(0x1p-6f), _CMP_LT_OQ), subnormal);
}

LOWBIT_INLINE float fake_quantize_row(float* values, int64_t count) {
    const float absmax = absmax_of(values, count);
    const float scale = not_zero(absmax) / 448.0f;
    for (int64_t i = 0; i < count; ++i) values[i] = round_e4m3(values[i] / scale) * scale;
    return poison_of(scale);
}

LOWBIT_INLINE void fake_quantize_channels(float* rows, int64_t width) {
    alignas(64) float scale[kLargestWidth] = {};
    for (int64_t key = 0; key < kBlockKeys; ++key)
        for (int64_t i = 0; i < width; ++i) {
            const float magnitude = as_float(as_bits(rows[key * width + i]) & 0x7fffffffu);
            scale[i] = magnitude > scale[i] ? magnitude : scale[i];
        }
    for (int64_t i = 0; i < width; ++i) scale[i] = (scale[i] < kSmallestAbsmax ? kSmallestAbsmax : scale[i]) / 448.0f;
    for (int64_t key = 0; key < kBlockKeys; ++key)
        for (int64_t i = 0; i < width; ++i) rows[key * width + i] = round_e4m3(rows[key * width + i] / scale[i]) * scale[i];
}

// Heads [first, last) of the group. Keys become [4 panels][width][16 keys], values stay [64 keys][width].
template <typename Input, bool Fp8>
void prepare_float(const AttentionJob& job, int64_t first, int64_t last) {
    alignas(64) float rows[kBlockKeys * kLargestWidth];
    const int64_t width = padded(job.width), key_blocks = blocks(job.keys, kBlockKeys);
    const int64_t key_stride = job.key_stride[1], value_stride = job.value_stride[1];
    for (int64_t index = first; index < last; ++index) {
        const Head<float> head = head_of<float>(job, index);
        const Input* key = head_input<Input>(job, job.key, job.key_stride, index);
        const Input* value = head_input<Input>(job, job.value, job.value_stride, index);
        find_keys(job, index, head);
        *head.poison = 0.0f;
        std::memset(head.key_mean, 0, width * sizeof(float));
        std::memset(head.value_mean, 0, width * sizeof(float));
        if (Fp8) mean_of(key, key_stride, head.keep, key_blocks, job.width, head.key_mean);
        if (Fp8) mean_of(value, value_stride, head.keep, key_blocks, job.width, head.value_mean);
        for (int64_t block = 0; block < key_blocks; ++block) {
            if (head.keep[block] == 0) continue;
            const int64_t start = block * kBlockKeys;
            load_rows(key + start * key_stride, key_stride, head.keep[block], job.width, head.key_mean, rows);
            for (int64_t i = 0; i < kBlockKeys; ++i)
                *head.poison += Fp8 ? fake_quantize_row(rows + i * width, width) : poison_of(absmax_of(rows + i * width, width));
            float* packed = head.key + start * width;
            for (int64_t panel = 0; panel < kBlockKeys; panel += 16)
                for (int64_t i = 0; i < width; ++i)
                    for (int64_t j = 0; j < 16; ++j) *packed++ = rows[(panel + j) * width + i];
            float* values = head.value + start * width;
            load_rows(value + start * value_stride, value_stride, head.keep[block], job.width, head.value_mean, values);
            if (Fp8) fake_quantize_channels(values, width);
        }
    }
}

struct FloatScratch {
    alignas(64) float query[kFloatRows * kLargestWidth];
    alignas(64) float scores[kFloatRows * kBlockKeys];  // then the powers
    alignas(64) float sums[kFloatRows * kLargestWidth];
    float poison[kFloatRows];
    Softmax<kFloatRows> softmax;
};

template <typename Input, bool Fp8>
LOWBIT_INLINE void load_queries(const AttentionJob& job, const Input* from, int64_t rows, FloatScratch& scratch) {
    const int64_t width = padded(job.width);
    for (int64_t row = 0; row < rows; ++row, from += job.query_stride[1]) {
        float* to = scratch.query + row * width;
        std::memset(to, 0, width * sizeof(float));
        for (int64_t i = 0; i < job.width; ++i) to[i] = base::widen(from[i]);
        scratch.poison[row] += Fp8 ? fake_quantize_row(to, job.width) : poison_of(absmax_of(to, job.width));
        for (int64_t i = 0; i < job.width; ++i) to[i] *= job.scale;
    }
}

// Masks the scores of a block and finds the highest of each row.
LOWBIT_INLINE void find_highest(float* scores, uint64_t bits, float* highest) {
    __m512 most = _mm512_set1_ps(kNoScore);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        const __m512 score = _mm512_mask_mov_ps(_mm512_set1_ps(kNoScore), static_cast<__mmask16>(bits >> (16 * i)),
                                                _mm512_load_ps(scores + 16 * i));
        _mm512_store_ps(scores + 16 * i, score);
        most = _mm512_max_ps(most, score);
    }
    *highest = _mm512_reduce_max_ps(most);
}

// Scores -> powers of two relative to the highest so far, and their sum.
template <bool Fp8>
LOWBIT_INLINE void soften_float_row(float* scores, uint64_t bits, float highest, float block_highest, float block_factor,
                                    float* sum) {
    __m512 total = _mm512_setzero_ps();
    const __m512 origin = _mm512_set1_ps(Fp8 ? block_highest : highest);
    const __m512 factor = _mm512_set1_ps(block_factor / 448.0f);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        __m512 power = exp2_of<6>(_mm512_sub_ps(_mm512_load_ps(scores + 16 * i), origin), -126.0f, Fp8 ? 448.0f : 1.0f);
        if (Fp8) power = _mm512_mul_ps(round_e4m3(power), factor);
        power = _mm512_maskz_mov_ps(static_cast<__mmask16>(bits >> (16 * i)), power);
        _mm512_store_ps(scores + 16 * i, power);
        total = _mm512_add_ps(total, power);
    }
    *sum = _mm512_reduce_add_ps(total);
}

// Tasks [first, last): blocks of queries of the group's heads.
template <typename Input, bool Fp8>
void attend_float(const AttentionJob& job, int64_t first, int64_t last) {
    alignas(64) FloatScratch scratch;
    const int64_t width = padded(job.width);
    Softmax<kFloatRows>& softmax = scratch.softmax;
    for (int64_t task = first; task < last; ++task) {
        const Queries queries(job, task, kFloatRows);
        const Head<float> head = head_of<float>(job, queries.head);
        for (float& poison : scratch.poison) poison = *head.poison;
        std::memset(scratch.sums, 0, queries.rows * width * sizeof(float));
        softmax.begin();
        load_queries<Input, Fp8>(job, queries.input<Input>(job), queries.rows, scratch);
        for (int64_t block = 0; block < queries.end_block; ++block) {
            if (head.keep[block] == 0) continue;
            const int64_t start = block * kBlockKeys;
            const auto bits_of = [&](int64_t row) {
                return job.causal ? causal_bits(head.keep[block], queries.top + row - start) : head.keep[block];
            };
            multiply_float_rows(
                {scratch.query, head.key + start * width, width, 16 * width, 16, width, scratch.scores, kBlockKeys, false},
                queries.rows, 4);
            for (int64_t row = 0; row < queries.rows; ++row)
                find_highest(scratch.scores + row * kBlockKeys, bits_of(row), softmax.block_highest + row);
            if (softmax.meet_block()) softmax.rescale(scratch.sums, queries.rows, width);
            for (int64_t row = 0; row < queries.rows; ++row)
                soften_float_row<Fp8>(scratch.scores + row * kBlockKeys, bits_of(row), softmax.highest[row],
                                      softmax.block_highest[row], softmax.block_factor[row], softmax.block_sum + row);
            for (float& factor : softmax.block_factor) factor = 1.0f;  // the powers hold it
            softmax.add_block();
            for (int64_t channel = 0; channel < width; channel += kVectorColumns)
                multiply_float_rows({scratch.scores, head.value + start * width + channel, kBlockKeys, 16, width, kBlockKeys,
                                     scratch.sums + channel, width, true},
                                    queries.rows, smaller(kVectorColumns, width - channel) / 16);
        }
        write_attention(job, softmax, scratch.sums, head.value_mean, scratch.poison, queries.rows, queries.output<Input>(job));
    }
}

LOWBIT_END
#endif  // LOWBIT_NATIVE_KERNELS_ATTENTION_FLOAT32_H
