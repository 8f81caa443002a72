// Attention in bfloat16 by AMX: the products' factors are the numbers themselves and the softmax's powers of two, rounded.
//
// Keys and values of a head are brought once to panels as amx_product.h has them, 128 keys together. A task is 256 queries:
// for each 128 keys it takes 32 of them after the other, so that what is read of keys and values stays in the cache. While the
// scores of 32 queries are multiplied, the scores of those before become powers: the units for both are different ones.
#ifndef LOWBIT_NATIVE_KERNELS_ATTENTION_AMX_H
#define LOWBIT_NATIVE_KERNELS_ATTENTION_AMX_H

#include "amx_product.h"
#include "attention.h"

LOWBIT_BEGIN(gemm)

using vnni::causal_bits;
using vnni::head_input;
using vnni::kBlockKeys;
using vnni::keep_bits;
using vnni::kLargestWidth;
using vnni::kNoScore;
using vnni::kRowsAhead;
using vnni::poison_of;
using vnni::prefetch_row;
using vnni::Queries;

constexpr int64_t kKeysTogether = 128;
constexpr int64_t kQueries = 256;              // a task's
constexpr int64_t kStepKeys = 32;              // in the 64 bytes of a tile's row
constexpr int64_t kBytesTogether = 512 << 10;  // of keys and values that stay in the second-level cache
constexpr float kMostAbove = 8.0f;  // that a score may be higher, in powers of two, before what was summed is scaled anew

LOWBIT_INLINE int64_t depth_steps(int64_t width) { return blocks(width, kStepKeys); }
LOWBIT_INLINE int64_t width_panels(int64_t width) { return blocks(width, 2 * kPanelChannels) * 2; }

// What queries need of a head's keys and values, in a piece of the workspace.
struct AmxHead {
    uint8_t* key;    // [blocks][8 panels of 16 keys][steps of 32 inputs][1 KiB]
    uint8_t* value;  // [blocks][panels of 16 channels][4 steps of 32 keys][1 KiB]
    uint64_t* keep;  // [2 * blocks]: a bit for each key that is there
    float* poison;   // [blocks]: NaN where a key is not finite, else 0
    int64_t key_block, value_block, bytes;

    AmxHead(char* at, int64_t keys, int64_t width) {
        const int64_t key_blocks = blocks(keys, kKeysTogether);
        key_block = kKeysTogether / kPanelChannels * depth_steps(width) * kTileBytes;
        value_block = width_panels(width) * (kKeysTogether / kStepKeys) * kTileBytes;
        key = reinterpret_cast<uint8_t*>(at);
        value = key + key_blocks * key_block;
        keep = reinterpret_cast<uint64_t*>(value + key_blocks * value_block);
        poison = reinterpret_cast<float*>(keep + 2 * key_blocks);
        bytes = blocks(key_blocks * (key_block + value_block + 16 + 4), 64) * 64;
    }
};

int64_t amx_head_bytes(const AttentionJob& job) { return AmxHead(nullptr, job.keys, job.width).bytes; }

// 16 keys, `there` of them, of up to 32 inputs each -> a tile; returns which inputs are not finite.
LOWBIT_INLINE __mmask32 pack_keys(const BFloat16* from, int64_t stride, uint32_t there, __mmask32 mask, uint8_t* to) {
    alignas(64) uint16_t rows[kPanelChannels][kStepKeys];
    const __m512i exponent = _mm512_set1_epi16(0x7f80);
    __mmask32 not_finite = 0;
    for (int64_t key = 0; key < kPanelChannels; ++key) {
        const __m512i row = _mm512_maskz_loadu_epi16(there >> key & 1 ? mask : 0, from + key * stride);
        not_finite |= _mm512_cmpeq_epi16_mask(_mm512_and_si512(row, exponent), exponent);
        _mm512_store_si512(rows[key], row);
    }
    pack_step(reinterpret_cast<const int8_t*>(rows), kStep, ~__mmask64{0}, reinterpret_cast<int8_t*>(to));
    return not_finite;
}

// 128 keys, those of `keep`, of up to 256 channels -> panels of tiles [16 pairs of keys][16 channels][2].
LOWBIT_INLINE void pack_values(const BFloat16* from, int64_t stride, const uint64_t* keep, int64_t width, uint8_t* to) {
    for (int64_t key = 0; key < kKeysTogether; key += 2, from += 2 * stride) {
        const uint64_t there = keep[key / 64] >> key % 64;
        uint8_t* word = to + (key / kStepKeys * 16 + key % kStepKeys / 2) * kStep;
        for (int64_t channel = 0; channel < width_panels(width) * kPanelChannels; channel += kPanelChannels) {
            const __mmask16 mask = column_mask(width - channel);
            const __m256i even = _mm256_maskz_loadu_epi16(there & 1 ? mask : 0, from + channel);
            const __m256i odd = _mm256_maskz_loadu_epi16(there & 2 ? mask : 0, from + stride + channel);
            const __m512i words = _mm512_slli_epi32(_mm512_cvtepu16_epi32(odd), 16);
            _mm512_store_si512(word, _mm512_or_si512(words, _mm512_cvtepu16_epi32(even)));
            word += kKeysTogether / kStepKeys * kTileBytes;
        }
    }
}

// Blocks [first, last) of 128 keys, of all heads of the group: what is read lies together so.
void prepare_amx(const AttentionJob& job, int64_t first, int64_t last) {
    const int64_t steps = depth_steps(job.width), key_stride = job.key_stride[1], value_stride = job.value_stride[1];
    for (int64_t block = first; block < last; ++block) {
        const int64_t start = block * kKeysTogether;
        for (int64_t index = 0; index < job.units; ++index) {
            const AmxHead head(job.workspace + index * job.head_bytes, job.keys, job.width);
            const auto* key = head_input<BFloat16>(job, job.key, job.key_stride, index) + start * key_stride;
            const auto* value = head_input<BFloat16>(job, job.value, job.value_stride, index) + start * value_stride;
            const uint8_t* keep = job.keep ? job.keep + (job.first_unit + index) / job.key_heads * job.keys + start : nullptr;
            uint64_t* bits = head.keep + 2 * block;
            for (int64_t half = 0; half < kKeysTogether; half += kBlockKeys) {
                const int64_t left = job.keys - start - half;
                bits[half / kBlockKeys] = left > 0 ? keep_bits(keep ? keep + half : nullptr, left) : 0;
            }
            uint8_t* to = head.key + block * head.key_block;
            __mmask32 not_finite = 0;
            for (int64_t panel = 0; panel < kKeysTogether; panel += kPanelChannels) {
                const auto there = static_cast<uint32_t>(bits[panel / kBlockKeys] >> panel % kBlockKeys & 0xffff);
                for (int64_t step = 0; step < steps; ++step, to += kTileBytes)
                    not_finite |= pack_keys(key + panel * key_stride + step * kStepKeys, key_stride, there,
                                            base::first_inputs(job.width - step * kStepKeys), to);
            }
            head.poison[block] = not_finite ? as_float(0x7fc00000u) : 0.0f;
            pack_values(value, value_stride, bits, job.width, head.value + block * head.value_block);
        }
    }
}

// What a task works with.
struct AmxAttention {
    alignas(64) uint8_t query[kQueries * kLargestWidth * 2];        // [8][steps][32 rows][64 bytes]
    alignas(64) float sums[kQueries * kLargestWidth];               // [8][pairs of panels][2][2][16][16]
    alignas(64) float scores[2][kRowsTogether * kKeysTogether];     // [4 pairs of panels][2][2][16][16]; one is read, one written
    alignas(64) uint8_t powers[kRowsTogether * kKeysTogether * 2];  // [4 steps][32 rows][64 bytes]
    alignas(64) float sum[kQueries][16];                            // in parts
    float highest[kQueries], poison[kQueries];
    bool has_sums[kQueries / kRowsTogether];
};

// Queries -> tiles, with the scale's sign, so that it needs none.
LOWBIT_INLINE void arrange_queries(const AttentionJob& job, const Queries& queries, float head_poison, AmxAttention& to) {
    const int64_t steps = depth_steps(job.width);
    const __m512i sign = _mm512_set1_epi16(static_cast<int16_t>(job.scale < 0.0f ? 0x8000 : 0));
    const __m512i exponent = _mm512_set1_epi16(0x7f80);
    const auto* from = queries.input<BFloat16>(job);
    for (int64_t row = 0; row < blocks(queries.rows, kRowsTogether) * kRowsTogether; ++row, from += job.query_stride[1]) {
        uint8_t* tile = to.query + (row / kRowsTogether * steps * kRowsTogether + row % kRowsTogether) * kStep;
        __mmask32 not_finite = 0;
        prefetch_row(from + kRowsAhead * job.query_stride[1], job.width * sizeof *from);
        for (int64_t step = 0; step < steps; ++step, tile += 2 * kTileBytes) {
            const __mmask32 mask = row < queries.rows ? base::first_inputs(job.width - step * kStepKeys) : 0;
            const __m512i values = _mm512_maskz_loadu_epi16(mask, from + step * kStepKeys);
            not_finite |= _mm512_cmpeq_epi16_mask(_mm512_and_si512(values, exponent), exponent);
            _mm512_store_si512(tile, _mm512_xor_si512(values, sign));
        }
        to.highest[row] = kNoScore;
        to.has_sums[row / kRowsTogether] = false;
        _mm512_store_ps(to.sum[row], _mm512_setzero_ps());
        to.poison[row] = not_finite ? as_float(0x7fc00000u) : head_poison;
    }
}

constexpr int64_t kStripSize = kRowsTogether * 2 * kPanelChannels;

// Where the 16 numbers of a row and a panel are in strips of 32 rows by 32 channels.
LOWBIT_INLINE int64_t strip_index(int64_t row, int64_t panel) {
    return (((panel / 2 * 2 + row / 16) * 2 + panel % 2) * 16 + row % 16) * 16;
}

// 2 to the power of x, by the polynomial of the least relative error over [0, 1): 2.7e-6, before rounding to 8 bits.
LOWBIT_INLINE __m512 power_of(__m512 x) {
    constexpr float kCoefficients[5] = {1.0000026f, 0.69300383f, 0.24144275f, 0.05201146f, 0.013534167f};
    const __m512 f = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
    __m512 power = _mm512_set1_ps(kCoefficients[4]);
#pragma GCC unroll 4
    for (int i = 3; i >= 0; --i) power = _mm512_fmadd_ps(power, f, _mm512_set1_ps(kCoefficients[i]));
    return _mm512_scalef_ps(power, x);
}

// Turns the scores of 32 queries into powers, a row at a time.
struct Softening {
    const AttentionJob* job;
    AmxAttention* task;
    float* sums;          // of these rows
    int64_t first, rows;  // of the task's queries
    int64_t row;          // the next
    const float* scores;
    const uint64_t* keep;  // of the block's keys
    int64_t panels;        // of 16 keys: 4 or 8
    int64_t ahead;         // of the first query to the block's first key, where causal

    void begin(const float* of_block, const uint64_t* there, int64_t count, int64_t distance) {
        row = 0, scores = of_block, keep = there, panels = count, ahead = distance;
    }

    template <int Panels, bool Masked>
    LOWBIT_INLINE_LAMBDA inline void soften(const uint64_t* bits) {
        const float scale = std::fabs(job->scale);
        const int64_t query = first + row;
        __m512 score[Panels];
#pragma GCC unroll 8
        for (int i = 0; i < Panels; ++i) score[i] = _mm512_load_ps(scores + strip_index(row, i));
        __mmask16 there[Panels];
        if (Masked) {
            for (int i = 0; i < Panels; ++i) {
                there[i] = static_cast<__mmask16>(bits[i / 4] >> (16 * (i % 4)));
                score[i] = _mm512_mask_mov_ps(_mm512_set1_ps(-std::numeric_limits<float>::infinity()), there[i], score[i]);
            }
        }
        __m512 top = _mm512_max_ps(score[0], score[1]);
#pragma GCC unroll 8
        for (int i = 2; i < Panels; ++i) top = _mm512_max_ps(top, score[i]);
        const float here = _mm512_reduce_max_ps(top), before = task->highest[query];
        const float scaled = here == -std::numeric_limits<float>::infinity() ? before : here * scale;  // the scale may be 0
        const float now = scaled > before + kMostAbove ? scaled : before;
        const __m512 shift = _mm512_set1_ps(now), factor = _mm512_set1_ps(scale);
        __m512 total = _mm512_setzero_ps();
        uint8_t* to = task->powers + row * kStep;
#pragma GCC unroll 4
        for (int i = 0; i < Panels; i += 2, to += 2 * kTileBytes) {
            __m512 power[2];
#pragma GCC unroll 2
            for (int j = 0; j < 2; ++j) {
                power[j] = power_of(_mm512_fmsub_ps(score[i + j], factor, shift));
                if (Masked) power[j] = _mm512_maskz_mov_ps(there[i + j], power[j]);
                total = _mm512_add_ps(total, power[j]);
            }
            const __m512bh rounded = _mm512_cvtne2ps_pbh(power[1], power[0]);
            _mm512_store_si512(to, reinterpret_cast<const __m512i&>(rounded));
        }
        __m512 before_sum = _mm512_load_ps(task->sum[query]);
        if (now != before && task->has_sums[first / kRowsTogether]) {
            const __m512 old = power_of(_mm512_set1_ps(before - now));
            before_sum = _mm512_mul_ps(before_sum, old);
            for (int64_t panel = 0; panel < width_panels(job->width); ++panel) {  // seldom
                float* at = sums + strip_index(row, panel);
                _mm512_store_ps(at, _mm512_mul_ps(_mm512_load_ps(at), old));
            }
        }
        task->highest[query] = now;
        _mm512_store_ps(task->sum[query], _mm512_add_ps(before_sum, total));
    }

    LOWBIT_INLINE_LAMBDA inline void operator()() {
        if (row >= rows) return;
        uint64_t bits[2] = {keep[0], keep[1]};
        if (job->causal)
            for (int i = 0; i < 2; ++i) bits[i] = causal_bits(bits[i], ahead + row - i * kBlockKeys);
        constexpr uint64_t kAll = ~uint64_t{0};
        if (panels == 4) soften<4, true>(bits);
        else if ((bits[0] & bits[1]) == kAll) soften<8, false>(bits);
        else soften<8, true>(bits);
        ++row;
    }
};

// Blocks [first, last) of 128 keys for 32 of a task's queries.
void attend_group(const AttentionJob& job, const Queries& queries, const AmxHead& head, int64_t group, int64_t first,
                  int64_t last, AmxAttention& task) {
    const int64_t steps = depth_steps(job.width), pairs = width_panels(job.width) / 2, row = group * kRowsTogether;
    const uint8_t* query = task.query + group * steps * kRowsTogether * kStep;
    float* sums = task.sums + group * pairs * kStripSize;
    Softening softening{&job, &task, sums, row, smaller(kRowsTogether, queries.rows - row)};
    softening.row = softening.rows;
    const auto add_values = [&](int64_t block) {
        while (softening.row < softening.rows) softening();
        const uint8_t* values = head.value + block * head.value_block;
        for (int64_t pair = 0; pair < pairs; ++pair)
            multiply_strip<AmxBFloat16>({task.powers, values + pair * 8 * kTileBytes, 4 * kTileBytes, softening.panels / 2,
                                         task.has_sums[group], reinterpret_cast<uint8_t*>(sums + pair * kStripSize)},
                                        []() LOWBIT_INLINE_LAMBDA {});
        task.has_sums[group] = true;
    };
    int64_t before = -1;
    for (int64_t block = first; block < last; ++block) {
        const uint64_t* keep = head.keep + 2 * block;
        if (!(keep[0] | keep[1])) continue;
        const int64_t panels = keep[1] ? 8 : 4;
        float* scores = task.scores[block % 2];
        const uint8_t* keys = head.key + block * head.key_block;
        for (int64_t panel = 0; panel < panels; panel += 2)
            multiply_strip<AmxBFloat16>({query, keys + panel * steps * kTileBytes, steps * kTileBytes, steps, false,
                                         reinterpret_cast<uint8_t*>(scores + panel / 2 * kStripSize)},
                                        [&]() LOWBIT_INLINE_LAMBDA {
                                            softening();
                                            softening();
                                        });
        if (before >= 0) add_values(before);
        softening.begin(scores, keep, panels, queries.top + row - block * kKeysTogether);
        before = block;
    }
    if (before >= 0) add_values(before);
}

void attend_amx(const AttentionJob& job, int64_t first, int64_t last) {
    auto& task = scratch_object<AmxAttention>(Slot::kAmxAttention);
    const int64_t sums_size = width_panels(job.width) / 2 * kStripSize;
    configure_tiles();
    for (int64_t number = first; number < last; ++number) {
        const Queries queries(job, number, kQueries);
        const AmxHead head(job.workspace + queries.head * job.head_bytes, job.keys, job.width);
        const int64_t groups = blocks(queries.rows, kRowsTogether);
        float poison = 0.0f;
        for (int64_t block = 0; block < blocks(job.keys, kKeysTogether); ++block) poison += head.poison[block];
        arrange_queries(job, queries, poison, task);
        const int64_t end = blocks(queries.end_block, 2), together = blocks(kBytesTogether, head.key_block + head.value_block);
        for (int64_t block = 0; block < end; block += together)
            for (int64_t group = 0; group < groups; ++group)
                attend_group(job, queries, head, group, block, smaller(block + together, end), task);
        auto* output = queries.output<BFloat16>(job);
        for (int64_t row = 0; row < queries.rows; ++row, output += job.heads * job.width) {
            const float* sums = task.sums + row / kRowsTogether * sums_size;
            if (!task.has_sums[row / kRowsTogether])
                std::memset(task.sums + row / kRowsTogether * sums_size, 0, sums_size * sizeof(float));
            const float sum = _mm512_reduce_add_ps(_mm512_load_ps(task.sum[row]));
            const __m512 factor = _mm512_set1_ps(sum == 0.0f ? 0.0f : 1.0f / sum);
            const __m512 bad = _mm512_set1_ps(task.poison[row] + poison_of(task.highest[row]));
            for (int64_t panel = 0; panel < blocks(job.width, kPanelChannels); ++panel) {
                const __m512 value = _mm512_mul_ps(_mm512_load_ps(sums + strip_index(row % kRowsTogether, panel)), factor);
                store_narrow(output + panel * kPanelChannels, column_mask(job.width - panel * kPanelChannels),
                             _mm512_add_ps(value, bad));
            }
        }
    }
    _tile_release();
}

constexpr AttentionKernels amx_attention = {
    amx_head_bytes, {nullptr, prepare_amx, nullptr}, {nullptr, attend_amx, nullptr}, kQueries, kKeysTogether};

LOWBIT_END
#endif  // LOWBIT_NATIVE_KERNELS_ATTENTION_AMX_H
