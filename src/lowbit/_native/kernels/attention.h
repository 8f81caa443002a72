// Attention with AVX-512, 64 keys at a time: scores, a softmax that is carried from block to block, values.
//
// A head's keys and values are brought once to the layout that the products read; then blocks of queries pass over them
// while both stay in the cache. attention_integers.h multiplies int8 and int16 by VNNI, attention_float32.h float32. What
// is computed is defined by lowbit/ops/attention.py.
#ifndef LOWBIT_NATIVE_KERNELS_ATTENTION_H
#define LOWBIT_NATIVE_KERNELS_ATTENTION_H

#include "quantize.h"

LOWBIT_BEGIN(vnni)

constexpr int64_t kBlockKeys = 64;
constexpr int64_t kLargestWidth = 256;
constexpr float kNoScore = -1e30f;  // of a row that has no key yet; finite, so that differences are
constexpr float kSmallestAbsmax = 1e-30f;

// What queries need of a head's keys and values, in a piece of the workspace. Widths are padded to multiples of 16.
template <typename Element>
struct Head {
    Element *key, *value;            // [blocks][64 keys x width], as the product reads them
    float *key_scale, *value_scale;  // [blocks][64], [blocks][width]
    float *key_mean, *value_mean;    // [width]
    int32_t* key_sum;                // [blocks][64]: what 128 added to a query has added to its score, negative
    uint64_t* keep;                  // [blocks]: a bit for each key that is there
    float* poison;                   // [1]: NaN where a key is not finite, else 0

    Head(char* at, int64_t key_blocks, int64_t width) {
        const int64_t keys = key_blocks * kBlockKeys;
        key = take<Element>(at, keys * width);
        value = take<Element>(at, keys * width);
        key_scale = take<float>(at, keys);
        value_scale = take<float>(at, key_blocks * width);
        key_mean = take<float>(at, width);
        value_mean = take<float>(at, width);
        key_sum = take<int32_t>(at, keys);
        keep = take<uint64_t>(at, key_blocks);
        poison = take<float>(at, 1);
        end = at;
    }
    char* end;

  private:
    template <typename T>
    static T* take(char*& at, int64_t count) {
        T* taken = reinterpret_cast<T*>(at);
        at += blocks(count * static_cast<int64_t>(sizeof(T)), 64) * 64;
        return taken;
    }
};

LOWBIT_INLINE int64_t padded(int64_t width) { return blocks(width, 16) * 16; }

template <typename Element>
int64_t head_bytes(const AttentionJob& job) {
    return Head<Element>(nullptr, blocks(job.keys, kBlockKeys), padded(job.width)).end - static_cast<char*>(nullptr);
}

template <typename Element>
Head<Element> head_of(const AttentionJob& job, int64_t index) {
    return Head<Element>(job.workspace + index * job.head_bytes, blocks(job.keys, kBlockKeys), padded(job.width));
}

// 2 to the power of f in [-0.5, 0.5] by the polynomial of the least relative error: 2.6e-6 of degree 4, 2e-9 of degree 6.
// The latter is 1 at 0.
template <int Degree>
constexpr float kPower[7] = {};
template <>
constexpr float kPower<4>[7] = {0.99999926f, 0.69312181f, 0.24024745f, 0.05591786f, 0.0095701f};
template <>
constexpr float kPower<6>[7] = {1.0f, 0.693147206f, 0.240226469f, 0.0555032878f, 0.00961848896f, 0.00133999314f, 0.00015345812f};

// 2 to the power of x in [-126, 0], NaN becoming the lowest.
template <int Degree>
LOWBIT_INLINE __m512 exp2_of(__m512 x, float lowest, float factor) {
    x = _mm512_max_ps(x, _mm512_set1_ps(lowest));
    const __m512 rounder = _mm512_set1_ps(12582912.0f);  // 1.5 * 2**23 leaves no bits for a fraction
    const __m512 shifted = _mm512_add_ps(x, rounder);
    const __m512 f = _mm512_sub_ps(x, _mm512_sub_ps(shifted, rounder));
    __m512 power = _mm512_set1_ps(factor * kPower<Degree>[Degree]);
#pragma GCC unroll 8
    for (int i = Degree - 1; i >= 0; --i) power = _mm512_fmadd_ps(power, f, _mm512_set1_ps(factor * kPower<Degree>[i]));
    return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(power), _mm512_slli_epi32(_mm512_castps_si512(shifted), 23)));
}

// The bits of a block's keys that are there: before the end, and kept by the mask.
LOWBIT_INLINE uint64_t keep_bits(const uint8_t* keep, int64_t count) {
    uint64_t bits = count >= kBlockKeys ? ~uint64_t{0} : (uint64_t{1} << count) - 1;
    if (keep == nullptr) return bits;
    for (int64_t i = 0; i < smaller(count, kBlockKeys); ++i)
        if (!keep[i]) bits &= ~(uint64_t{1} << i);
    return bits;
}

// Those of them that come no later than the query, `ahead` keys after the block's first.
LOWBIT_INLINE uint64_t causal_bits(uint64_t keep, int64_t ahead) {
    if (ahead < 0) return 0;
    return ahead >= kBlockKeys - 1 ? keep : keep & ((uint64_t{2} << ahead) - 1);
}

constexpr int64_t kRowsAhead = 8;  // a head's rows lie far apart: the memory is asked for them in time

LOWBIT_INLINE void prefetch_row(const void* row, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(static_cast<const char*>(row) + i);
}

// A block's rows as float32 [64][padded width] less the mean, zero where there is no key.
template <typename Input>
LOWBIT_INLINE void load_rows(const Input* from, int64_t stride, uint64_t keep, int64_t width, const float* mean, float* to) {
    const int64_t columns = padded(width);
    for (int64_t row = 0; row < kBlockKeys; ++row, to += columns) {
        std::memset(to, 0, columns * sizeof(float));
        if (!(keep >> row & 1)) continue;
        const Input* x = from + row * stride;
        prefetch_row(x + kRowsAhead * stride, width * sizeof(Input));
        for (int64_t i = 0; i < width; ++i) to[i] = base::widen(x[i]) - mean[i];
    }
}

// The mean over the keys that are there; zero where none is.
template <typename Input>
void mean_of(const Input* from, int64_t stride, const uint64_t* keep, int64_t key_blocks, int64_t width, float* mean) {
    alignas(64) float sums[kLargestWidth];
    int64_t count = 0;
    std::memset(mean, 0, padded(width) * sizeof(float));
    for (int64_t block = 0; block < key_blocks; ++block, from += kBlockKeys * stride) {
        if (keep[block] == 0) continue;
        std::memset(sums, 0, sizeof sums);
        for (int64_t row = 0; row < kBlockKeys; ++row) {
            if (!(keep[block] >> row & 1)) continue;
            const Input* x = from + row * stride;
            prefetch_row(x + kRowsAhead * stride, width * sizeof(Input));
            for (int64_t i = 0; i < width; ++i) sums[i] += base::widen(x[i]);
        }
        for (int64_t i = 0; i < width; ++i) mean[i] += sums[i];
        count += __builtin_popcountll(keep[block]);
    }
    for (int64_t i = 0; i < width; ++i) mean[i] /= static_cast<float>(count < 1 ? 1 : count);
}

// 0 for a number, NaN for the others.
LOWBIT_INLINE float poison_of(float value) { return value - value; }

LOWBIT_INLINE float not_zero(float absmax) { return absmax < kSmallestAbsmax ? kSmallestAbsmax : absmax; }

LOWBIT_INLINE float absmax_of(const float* values, int64_t count) { return as_float(base::largest(values, count, 0)); }

// A query's numbers from block to block.
template <int64_t Rows>
struct Softmax {
    alignas(64) float highest[Rows];  // score so far
    alignas(64) float sum[Rows];      // of the powers, relative to it
    alignas(64) float block_highest[Rows], block_sum[Rows];
    alignas(64) float old_factor[Rows], block_factor[Rows];

    void begin() {
        for (int64_t i = 0; i < Rows; ++i) {
            highest[i] = block_highest[i] = kNoScore;
            sum[i] = block_sum[i] = 0.0f;
        }
    }

    // Factors that bring what was summed before, and what this block gives relative to its own highest score, to the
    // higher of both; returns whether anything summed before changes.
    bool meet_block() {
        bool changes = false;
        for (int64_t i = 0; i < Rows; i += 16) {
            const __m512 before = _mm512_load_ps(highest + i), here = _mm512_load_ps(block_highest + i);
            const __m512 now = _mm512_max_ps(before, here);
            _mm512_store_ps(highest + i, now);
            _mm512_store_ps(old_factor + i, exp2_of<6>(_mm512_sub_ps(before, now), -126.0f, 1.0f));
            _mm512_store_ps(block_factor + i, exp2_of<6>(_mm512_sub_ps(here, now), -126.0f, 1.0f));
            changes |= _mm512_cmp_ps_mask(before, now, _CMP_NEQ_UQ) != 0;
        }
        return changes;
    }

    void add_block() {
        for (int64_t i = 0; i < Rows; ++i) sum[i] = sum[i] * old_factor[i] + block_sum[i] * block_factor[i];
    }

    void rescale(float* sums, int64_t rows, int64_t columns) const {
        for (int64_t row = 0; row < rows; ++row) {
            if (old_factor[row] == 1.0f) continue;
            for (int64_t i = 0; i < columns; ++i) sums[row * columns + i] *= old_factor[row];
        }
    }
};

// sums [rows][padded width] / the rows' sums + mean -> output, NaN in rows that met what is not finite. A row without
// keys gives zeros.
template <typename Output, int64_t Rows>
LOWBIT_INLINE void write_attention(const AttentionJob& job, const Softmax<Rows>& softmax, const float* sums, const float* mean,
                                   const float* poison, int64_t rows, Output* output) {
    const int64_t columns = padded(job.width);
    for (int64_t row = 0; row < rows; ++row) {
        const bool empty = softmax.sum[row] == 0.0f;
        const float factor = empty ? 0.0f : 1.0f / softmax.sum[row];
        const float bad = poison[row] + poison_of(softmax.highest[row]);  // comparisons have dropped NaN from all else
        Output* to = output + row * job.heads * job.width;
        for (int64_t i = 0; i < job.width; ++i)
            base::narrow(sums[row * columns + i] * factor + (empty ? 0.0f : mean[i]) + bad, to[i]);
    }
}

// Where a task's queries are.
struct Queries {
    int64_t head, batch, query_head, top, rows, end_block;

    Queries(const AttentionJob& job, int64_t task, int64_t block_rows) {
        const int64_t row_blocks = blocks(job.queries, block_rows), shared = job.heads / job.key_heads;
        head = task / (row_blocks * shared);
        const int64_t unit = job.first_unit + head;
        batch = unit / job.key_heads;
        query_head = unit % job.key_heads * shared + task / row_blocks % shared;
        top = task % row_blocks * block_rows;
        rows = smaller(block_rows, job.queries - top);
        end_block = blocks(job.causal ? smaller(job.keys, top + rows) : job.keys, kBlockKeys);
    }

    template <typename Input>
    const Input* input(const AttentionJob& job) const {
        return static_cast<const Input*>(job.query) + batch * job.query_stride[0] + top * job.query_stride[1] +
               query_head * job.query_stride[2];
    }

    template <typename Output>
    Output* output(const AttentionJob& job) const {
        return static_cast<Output*>(job.output) + ((batch * job.queries + top) * job.heads + query_head) * job.width;
    }
};

// Where a head's keys or values are.
template <typename Input>
LOWBIT_INLINE const Input* head_input(const AttentionJob& job, const void* data, const int64_t* stride, int64_t index) {
    const int64_t unit = job.first_unit + index;
    return static_cast<const Input*>(data) + unit / job.key_heads * stride[0] + unit % job.key_heads * stride[2];
}

template <typename Element>
LOWBIT_INLINE void find_keys(const AttentionJob& job, int64_t index, const Head<Element>& head) {
    const uint8_t* keep = job.keep ? job.keep + (job.first_unit + index) / job.key_heads * job.keys : nullptr;
    for (int64_t block = 0; block < blocks(job.keys, kBlockKeys); ++block)
        head.keep[block] = keep_bits(keep ? keep + block * kBlockKeys : nullptr, job.keys - block * kBlockKeys);
}

LOWBIT_END
#endif  // LOWBIT_NATIVE_KERNELS_ATTENTION_H
