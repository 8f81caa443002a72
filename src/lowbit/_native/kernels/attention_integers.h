// Attention in integers; products are multiply_tile's of int8_product.h. Of 8 bits: queries as uint8 (int8 + 128), keys and
// values as int8, softmax as uint8 of each row's highest value in a block of keys. Of 16 bits: all as int16, scaled so
// that no sum leaves int32; what they lose is less than a bfloat16 result may by being rounded.
#ifndef LOWBIT_NATIVE_KERNELS_ATTENTION_INTEGERS_H
#define LOWBIT_NATIVE_KERNELS_ATTENTION_INTEGERS_H

#include "attention.h"
#include "int8_product.h"

LOWBIT_BEGIN(vnni)

constexpr int64_t kIntegerRows = 48;

struct Attention8 : Dot8 {
    using Element = int8_t;
    static constexpr int kQueryOffset = 128;  // the instruction's first factor has no sign
    static constexpr float kLargestPower = 255.0f, kLargestValue = 127.0f;

    static float scale_of(const float* values, int64_t width) { return not_zero(absmax_of(values, width)) / 127.0f; }
    static void store(Element* to, __m512i codes) {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8(codes));
    }

    // Narrows 64 powers and returns their sum's parts; within 128 bits instructions keep their order, not beyond.
    static __m512i store_powers(Element* to, const __m512i* powers) {
        const __m512i low = _mm512_packs_epi32(powers[0], powers[1]), high = _mm512_packs_epi32(powers[2], powers[3]);
        const __m512i all = _mm512_packus_epi16(low, high);
        _mm512_store_si512(to, all);
        return _mm512_dpbusd_epi32(_mm512_setzero_si512(), all, _mm512_set1_epi8(1));
    }
    // Whose power is at a position after that.
    static constexpr int64_t key_at(int64_t position) { return position % 16 / 4 * 16 + position / 16 * 4 + position % 4; }
};

struct Attention16 : Dot16 {
    using Element = int16_t;
    static constexpr int kQueryOffset = 0;
    static constexpr float kLargestPower = 4095.0f, kLargestValue = 8191.0f;  // times 64 keys: below 2**31

    // By Cauchy's inequality no score, nor a part of its sum, exceeds the product of the norms: 46000 ** 2 < 2 ** 31.
    static float scale_of(const float* values, int64_t width) {
        const float absmax = not_zero(absmax_of(values, width));
        const __m512 inverse = _mm512_set1_ps(1.0f / absmax);
        __m512 squares = _mm512_setzero_ps();
        for (int64_t i = 0; i < width; i += 16) {
            const __m512 value = _mm512_mul_ps(_mm512_load_ps(values + i), inverse);
            squares = _mm512_fmadd_ps(value, value, squares);
        }
        const float norm = std::sqrt(_mm512_reduce_add_ps(squares)), least = 46000.0f / 32767.0f;
        return absmax * ((norm > least ? norm : least) / 46000.0f);
    }
    static void store(Element* to, __m512i codes) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16(codes));
    }

    static __m512i store_powers(Element* to, const __m512i* powers) {
        const __m512i low = _mm512_packs_epi32(powers[0], powers[1]), high = _mm512_packs_epi32(powers[2], powers[3]);
        _mm512_store_si512(to, low);
        _mm512_store_si512(to + 32, high);
        const __m512i ones = _mm512_set1_epi16(1);
        return _mm512_dpwssd_epi32(_mm512_dpwssd_epi32(_mm512_setzero_si512(), low, ones), high, ones);
    }
    static constexpr int64_t key_at(int64_t position) {
        return position / 32 * 32 + position % 8 / 4 * 16 + position % 32 / 8 * 4 + position % 4;
    }
};

LOWBIT_INLINE __m512i codes_of(__m512 values, __m512 scale) { return _mm512_cvtps_epi32(_mm512_div_ps(values, scale)); }

// rows [64][width] -> [4 panels of 16 keys][words of a row][16 keys], a scale a key.
template <typename Kind>
LOWBIT_INLINE void pack_keys(const float* rows, int64_t width, int64_t block, const Head<typename Kind::Element>& head) {
    constexpr int64_t kPerWord = 4 / sizeof(typename Kind::Element), kWords = 16 / kPerWord;
    char* packed = reinterpret_cast<char*>(head.key + block * kBlockKeys * width);
    for (int64_t key = 0; key < kBlockKeys; ++key, rows += width) {
        const float scale = Kind::scale_of(rows, width);
        head.key_scale[block * kBlockKeys + key] = scale;
        *head.poison += poison_of(scale);
        char* to = packed + key / 16 * 16 * width * sizeof(typename Kind::Element) + key % 16 * 4;
        __m512i sum = _mm512_setzero_si512();
        for (int64_t i = 0; i < width; i += 16, to += kWords * 64) {
            const __m512i codes = codes_of(_mm512_load_ps(rows + i), _mm512_set1_ps(scale));
            sum = _mm512_add_epi32(sum, codes);
            alignas(32) typename Kind::Element elements[16];
            Kind::store(elements, codes);
            for (int64_t word = 0; word < kWords; ++word) std::memcpy(to + word * 64, elements + word * kPerWord, 4);
        }
        head.key_sum[block * kBlockKeys + key] = -Kind::kQueryOffset * _mm512_reduce_add_epi32(sum);
    }
}

// rows [64][width] -> [width / 16][words of the keys][16 channels], a scale a channel; keys in the powers' order.
template <typename Kind>
LOWBIT_INLINE void pack_values(const float* rows, int64_t width, int64_t block, const Head<typename Kind::Element>& head) {
    constexpr int64_t kPerWord = 4 / sizeof(typename Kind::Element), kBits = 32 / kPerWord;
    typename Kind::Element* packed = head.value + block * kBlockKeys * width;
    const __m512i element = _mm512_set1_epi32((1 << kBits) - 1);
    for (int64_t channel = 0; channel < width; channel += 16, packed += 16 * kBlockKeys) {
        const float* from = rows + channel;
        __m512i absmax = _mm512_setzero_si512();  // as bits, NaN above infinity
        for (int64_t key = 0; key < kBlockKeys; ++key)
            absmax = _mm512_max_epi32(absmax, _mm512_castps_si512(_mm512_abs_ps(_mm512_load_ps(from + key * width))));
        absmax = _mm512_max_epi32(absmax, _mm512_castps_si512(_mm512_set1_ps(kSmallestAbsmax)));
        const __m512 scale = _mm512_div_ps(_mm512_castsi512_ps(absmax), _mm512_set1_ps(Kind::kLargestValue));
        _mm512_store_ps(head.value_scale + block * width + channel, scale);
        for (int64_t key = 0; key < kBlockKeys; key += kPerWord) {
            __m512i word = _mm512_setzero_si512();
            for (int64_t i = 0; i < kPerWord; ++i) {
                const __m512i codes = codes_of(_mm512_load_ps(from + Kind::key_at(key + i) * width), scale);
                word = _mm512_or_si512(word, _mm512_sllv_epi32(_mm512_and_si512(codes, element), _mm512_set1_epi32(kBits * i)));
            }
            _mm512_store_si512(packed + key * 16, word);
        }
    }
}

// Heads [first, last) of the group.
template <typename Kind, typename Input>
void prepare_integers(const AttentionJob& job, int64_t first, int64_t last) {
    alignas(64) float rows[kBlockKeys * kLargestWidth];
    const int64_t width = padded(job.width), key_blocks = blocks(job.keys, kBlockKeys);
    const int64_t key_stride = job.key_stride[1], value_stride = job.value_stride[1];
    for (int64_t index = first; index < last; ++index) {
        const Head<typename Kind::Element> head = head_of<typename Kind::Element>(job, index);
        const Input* key = head_input<Input>(job, job.key, job.key_stride, index);
        const Input* value = head_input<Input>(job, job.value, job.value_stride, index);
        find_keys(job, index, head);
        *head.poison = 0.0f;
        mean_of(key, key_stride, head.keep, key_blocks, job.width, head.key_mean);
        mean_of(value, value_stride, head.keep, key_blocks, job.width, head.value_mean);
        for (int64_t block = 0; block < key_blocks; ++block) {
            if (head.keep[block] == 0) continue;
            const int64_t start = block * kBlockKeys;
            load_rows(key + start * key_stride, key_stride, head.keep[block], job.width, head.key_mean, rows);
            pack_keys<Kind>(rows, width, block, head);
            load_rows(value + start * value_stride, value_stride, head.keep[block], job.width, head.value_mean, rows);
            pack_values<Kind>(rows, width, block, head);
        }
    }
}

// Queries -> codes [rows][width], and what a score's integer is multiplied by.
template <typename Kind, typename Input>
LOWBIT_INLINE void quantize_queries(const AttentionJob& job, const Input* from, int64_t rows, typename Kind::Element* codes,
                                    float* scale, float* poison) {
    alignas(64) float values[kLargestWidth] = {};
    const int64_t width = padded(job.width);
    const float sign = job.scale < 0.0f ? -1.0f : 1.0f;  // of the queries, so that the scale has none
    for (int64_t row = 0; row < rows; ++row, from += job.query_stride[1], codes += width) {
        prefetch_row(from + kRowsAhead * job.query_stride[1], job.width * sizeof(Input));
        for (int64_t i = 0; i < job.width; ++i) values[i] = sign * base::widen(from[i]);
        const float step = Kind::scale_of(values, width);
        scale[row] = step * sign * job.scale;
        poison[row] += poison_of(step);
        for (int64_t i = 0; i < width; i += 16) {
            const __m512i code = codes_of(_mm512_load_ps(values + i), _mm512_set1_ps(step));
            Kind::store(codes + i, _mm512_add_epi32(code, _mm512_set1_epi32(Kind::kQueryOffset)));
        }
    }
}

// A row of 64 integers -> scores, then powers of two relative to the highest, as integers up to kLargestPower. scale >= 0.
template <typename Kind>
LOWBIT_INLINE void soften_row(const int32_t* integers, const int32_t* key_sum, const float* key_scale, float scale, uint64_t bits,
                              typename Kind::Element* powers, float* highest, float* sum) {
    __m512 score[4];  // less the scale
    __m512i power[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        __m512i integer = _mm512_load_si512(integers + 16 * i);
        if (Kind::kQueryOffset != 0) integer = _mm512_add_epi32(integer, _mm512_load_si512(key_sum + 16 * i));
        score[i] = _mm512_mul_ps(_mm512_cvtepi32_ps(integer), _mm512_load_ps(key_scale + 16 * i));
    }
    if (bits != ~uint64_t{0}) {
        const __m512 none = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
        for (int i = 0; i < 4; ++i) score[i] = _mm512_mask_mov_ps(none, static_cast<__mmask16>(bits >> (16 * i)), score[i]);
    }
    const __m512 low = _mm512_max_ps(score[0], score[1]), high = _mm512_max_ps(score[2], score[3]);
    *highest = _mm512_reduce_max_ps(_mm512_max_ps(low, high)) * scale;
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        const __m512 exponent = _mm512_fmsub_ps(score[i], _mm512_set1_ps(scale), _mm512_set1_ps(*highest));
        power[i] = _mm512_cvtps_epi32(exp2_of<4>(exponent, -20.0f, Kind::kLargestPower));
    }
    *sum = static_cast<float>(_mm512_reduce_add_epi32(Kind::store_powers(powers, power)));
}

// What a task works with; 90 to 130 KiB, most of it in use only for the widest heads.
template <typename Kind>
struct IntegerScratch {
    alignas(64) typename Kind::Element query[kIntegerRows * kLargestWidth];
    alignas(64) int32_t integers[kIntegerRows * kVectorColumns];
    alignas(64) typename Kind::Element powers[kIntegerRows * kBlockKeys];
    alignas(64) float sums[kIntegerRows * kLargestWidth];
    float scale[kIntegerRows], poison[kIntegerRows];
    Softmax<kIntegerRows> softmax;
};

// rows [rows][depth] times panels of 16 columns -> scratch.integers [rows][64].
template <typename Kind>
LOWBIT_INLINE void multiply_rows(IntegerScratch<Kind>& scratch, const typename Kind::Element* x, int64_t rows, int64_t depth,
                                 const typename Kind::Element* weight, int64_t panels) {
    const int64_t bytes = depth * sizeof(typename Kind::Element);
    for (int64_t row = 0; row < rows; row += kVectorRows) {
        const int64_t count = smaller(kVectorRows, rows - row);
        Tile tile{{}, reinterpret_cast<const int8_t*>(weight), 16 * bytes, bytes, scratch.integers + row * kVectorColumns, false};
        for (int64_t i = 0; i < count; ++i) tile.x[i] = reinterpret_cast<const uint8_t*>(x + (row + i) * depth);
        kTiles<Kind>[count - 1][panels - 1](tile);
    }
}

template <typename Kind>
LOWBIT_INLINE void add_values(IntegerScratch<Kind>& scratch, int64_t rows, int64_t width, const typename Kind::Element* value,
                              const float* value_scale) {
    for (int64_t channel = 0; channel < width; channel += kVectorColumns) {
        const int64_t columns = smaller(kVectorColumns, width - channel);
        multiply_rows(scratch, scratch.powers, rows, kBlockKeys, value + channel * kBlockKeys, columns / 16);
        for (int64_t row = 0; row < rows; ++row) {
            const __m512 factor = _mm512_set1_ps(scratch.softmax.block_factor[row]);
            float* sums = scratch.sums + row * width + channel;
            for (int64_t i = 0; i < columns; i += 16) {
                const __m512 product = _mm512_cvtepi32_ps(_mm512_load_si512(scratch.integers + row * kVectorColumns + i));
                const __m512 scaled = _mm512_mul_ps(product, _mm512_load_ps(value_scale + channel + i));
                _mm512_store_ps(sums + i, _mm512_fmadd_ps(scaled, factor, _mm512_load_ps(sums + i)));
            }
        }
    }
}

// Tasks [first, last): blocks of queries of the group's heads.
template <typename Kind, typename Input>
void attend_integers(const AttentionJob& job, int64_t first, int64_t last) {
    alignas(64) IntegerScratch<Kind> scratch;
    const int64_t width = padded(job.width);
    for (int64_t task = first; task < last; ++task) {
        const Queries queries(job, task, kIntegerRows);
        const Head<typename Kind::Element> head = head_of<typename Kind::Element>(job, queries.head);
        for (float& poison : scratch.poison) poison = *head.poison;
        std::memset(scratch.sums, 0, queries.rows * width * sizeof(float));
        scratch.softmax.begin();
        quantize_queries<Kind>(job, queries.template input<Input>(job), queries.rows, scratch.query, scratch.scale,
                               scratch.poison);
        for (int64_t block = 0; block < queries.end_block; ++block) {
            if (head.keep[block] == 0) continue;
            const int64_t start = block * kBlockKeys;
            multiply_rows(scratch, scratch.query, queries.rows, width, head.key + start * width, 4);
            for (int64_t row = 0; row < queries.rows; ++row) {
                const uint64_t keep = head.keep[block];
                const uint64_t bits = job.causal ? causal_bits(keep, queries.top + row - start) : keep;
                typename Kind::Element* powers = scratch.powers + row * kBlockKeys;
                float *highest = scratch.softmax.block_highest + row, *sum = scratch.softmax.block_sum + row;
                if (bits != 0) {
                    soften_row<Kind>(scratch.integers + row * kVectorColumns, head.key_sum + start, head.key_scale + start,
                                     scratch.scale[row], bits, powers, highest, sum);
                } else {
                    std::memset(powers, 0, kBlockKeys * sizeof *powers);
                    *highest = kNoScore;
                    *sum = 0.0f;
                }
            }
            if (scratch.softmax.meet_block()) scratch.softmax.rescale(scratch.sums, queries.rows, width);
            scratch.softmax.add_block();
            add_values(scratch, queries.rows, width, head.value + start * width, head.value_scale + block * width);
        }
        write_attention(job, scratch.softmax, scratch.sums, head.value_mean, scratch.poison, queries.rows,
                        queries.template output<Input>(job));
    }
}

LOWBIT_END
#endif  // LOWBIT_NATIVE_KERNELS_ATTENTION_INTEGERS_H
