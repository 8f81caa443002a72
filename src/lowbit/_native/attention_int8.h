// Attention in 8-bit integers: queries as uint8 (int8 + 128), keys and values as int8, softmax as uint8 of each row's
// highest value in a block of keys. Products are multiply_tile's of int8_product.h.

constexpr int64_t kInt8Rows = 48;

LOWBIT_INLINE __m512i codes_of(__m512 values, __m512 scale) {
    return _mm512_cvtps_epi32(_mm512_div_ps(values, scale));
}

// rows [64][width] -> [4 panels of 16 keys][width / 4][16 keys][4], a scale a key.
LOWBIT_INLINE void pack_int8_keys(const float* rows, int64_t width, int64_t block, const Head<int8_t>& head) {
    int8_t* packed = head.key + block * kBlockKeys * width;
    for (int64_t key = 0; key < kBlockKeys; ++key, rows += width) {
        const float absmax = absmax_of(rows, width);
        const float scale = (absmax < kSmallestAbsmax ? kSmallestAbsmax : absmax) / 127.0f;
        head.key_scale[block * kBlockKeys + key] = scale;
        *head.poison += poison_of(scale);
        int8_t* to = packed + key / 16 * 16 * width + key % 16 * 4;
        __m512i sum = _mm512_setzero_si512();
        for (int64_t i = 0; i < width; i += 16) {
            const __m512i codes = codes_of(_mm512_load_ps(rows + i), _mm512_set1_ps(scale));
            sum = _mm512_add_epi32(sum, codes);
            alignas(16) int8_t bytes[16];
            _mm_store_si128(reinterpret_cast<__m128i*>(bytes), _mm512_cvtepi32_epi8(codes));
            for (int64_t four = 0; four < 4; ++four) std::memcpy(to + (i + 4 * four) * 16, bytes + 4 * four, 4);
        }
        head.key_sum[block * kBlockKeys + key] = -128 * _mm512_reduce_add_epi32(sum);
    }
}

// rows [64][width] -> [width / 16][16 groups of keys][16 channels][4 keys], a scale a channel.
LOWBIT_INLINE void pack_int8_values(const float* rows, int64_t width, int64_t block, const Head<int8_t>& head) {
    int8_t* packed = head.value + block * kBlockKeys * width;
    const __m512i byte = _mm512_set1_epi32(255);
    for (int64_t channel = 0; channel < width; channel += 16, packed += 16 * kBlockKeys) {
        const float* from = rows + channel;
        __m512i absmax = _mm512_setzero_si512();  // as bits, NaN above infinity
        for (int64_t key = 0; key < kBlockKeys; ++key)
            absmax = _mm512_max_epi32(absmax, _mm512_castps_si512(_mm512_abs_ps(_mm512_load_ps(from + key * width))));
        absmax = _mm512_max_epi32(absmax, _mm512_castps_si512(_mm512_set1_ps(kSmallestAbsmax)));
        const __m512 scale = _mm512_div_ps(_mm512_castsi512_ps(absmax), _mm512_set1_ps(127.0f));
        _mm512_store_ps(head.value_scale + block * width + channel, scale);
        for (int64_t key = 0; key < kBlockKeys; key += 4) {
            __m512i word = _mm512_setzero_si512();
            for (int64_t i = 0; i < 4; ++i) {
                const __m512i codes = codes_of(_mm512_load_ps(from + (key + i) * width), scale);
                word = _mm512_or_si512(word, _mm512_sllv_epi32(_mm512_and_si512(codes, byte), _mm512_set1_epi32(8 * i)));
            }
            _mm512_store_si512(packed + key * 16, word);
        }
    }
}

// Heads [first, last) of the group.
template <typename Input>
void prepare_int8(const AttentionJob& job, int64_t first, int64_t last) {
    alignas(64) float rows[kBlockKeys * kLargestWidth];
    const int64_t width = padded(job.width), key_blocks = blocks(job.keys, kBlockKeys);
    const int64_t key_stride = job.key_stride[1], value_stride = job.value_stride[1];
    for (int64_t index = first; index < last; ++index) {
        const Head<int8_t> head = head_of<int8_t>(job, index);
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
            pack_int8_keys(rows, width, block, head);
            load_rows(value + start * value_stride, value_stride, head.keep[block], job.width, head.value_mean, rows);
            pack_int8_values(rows, width, block, head);
        }
    }
}

// Queries -> uint8 [rows][width], and what a score's integer is multiplied by.
template <typename Input>
LOWBIT_INLINE void quantize_queries(const AttentionJob& job, const Input* from, int64_t rows, uint8_t* codes, float* scale,
                                    float* poison) {
    alignas(64) float values[kLargestWidth] = {};
    const int64_t width = padded(job.width);
    for (int64_t row = 0; row < rows; ++row, from += job.query_stride[1], codes += width) {
        for (int64_t i = 0; i < job.width; ++i) values[i] = avx512::widen(from[i]);
        const float absmax = absmax_of(values, job.width);
        const float step = (absmax < kSmallestAbsmax ? kSmallestAbsmax : absmax) / 127.0f;
        scale[row] = step * job.scale;
        poison[row] += poison_of(step);
        for (int64_t i = 0; i < width; i += 16) {
            const __m512i shifted =
                _mm512_add_epi32(codes_of(_mm512_load_ps(values + i), _mm512_set1_ps(step)), _mm512_set1_epi32(128));
            _mm_storeu_si128(reinterpret_cast<__m128i*>(codes + i), _mm512_cvtepi32_epi8(shifted));
        }
    }
}

// A row of 64 integers -> scores, then powers of two relative to the highest, as uint8: 255 times the power.
LOWBIT_INLINE void soften_int8_row(const int32_t* integers, const int32_t* key_sum, const float* key_scale, float scale,
                                   uint64_t bits, uint8_t* powers, float* highest, float* sum) {
    __m512 score[4];
    __m512i code[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        const __m512i integer = _mm512_add_epi32(_mm512_load_si512(integers + 16 * i), _mm512_load_si512(key_sum + 16 * i));
        score[i] = _mm512_mul_ps(_mm512_cvtepi32_ps(integer),
                                 _mm512_mul_ps(_mm512_load_ps(key_scale + 16 * i), _mm512_set1_ps(scale)));
        score[i] = _mm512_mask_mov_ps(_mm512_set1_ps(kNoScore), static_cast<__mmask16>(bits >> (16 * i)), score[i]);
    }
    *highest =
        _mm512_reduce_max_ps(_mm512_max_ps(_mm512_max_ps(score[0], score[1]), _mm512_max_ps(score[2], score[3])));
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i)
        code[i] = _mm512_cvtps_epi32(exp2_of<5>(_mm512_sub_ps(score[i], _mm512_set1_ps(*highest)), -20.0f, 255.0f));
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    const __m512i mixed = _mm512_packus_epi16(_mm512_packs_epi32(code[0], code[1]), _mm512_packs_epi32(code[2], code[3]));
    const __m512i bytes = _mm512_permutexvar_epi32(order, mixed);
    _mm512_store_si512(powers, bytes);
    const __m512i total = _mm512_dpbusd_epi32(_mm512_setzero_si512(), bytes, _mm512_set1_epi8(1));
    *sum = static_cast<float>(_mm512_reduce_add_epi32(total));
}

// What a task works with; about 80 KiB, most of it in use only for the widest heads.
struct Int8Scratch {
    alignas(64) uint8_t query[kInt8Rows * kLargestWidth];
    alignas(64) int32_t integers[kInt8Rows * kTileColumns];
    alignas(64) uint8_t powers[kInt8Rows * kBlockKeys];
    alignas(64) float sums[kInt8Rows * kLargestWidth];
    float scale[kInt8Rows], poison[kInt8Rows];
    Softmax<kInt8Rows> softmax;
};

// rows [rows][depth] times panels of 16 columns -> scratch.integers [rows][64].
LOWBIT_INLINE void multiply_rows(Int8Scratch& scratch, const uint8_t* x, int64_t rows, int64_t depth, const int8_t* weight,
                                 int64_t panels) {
    for (int64_t row = 0; row < rows; row += kTileRows) {
        const int64_t count = smaller(kTileRows, rows - row);
        Tile tile{{}, weight, 16 * depth, depth, scratch.integers + row * kTileColumns, false};
        for (int64_t i = 0; i < count; ++i) tile.x[i] = x + (row + i) * depth;
        kTiles[count - 1][panels - 1](tile);
    }
}

LOWBIT_INLINE void add_int8_values(Int8Scratch& scratch, int64_t rows, int64_t width, const int8_t* value,
                                   const float* value_scale) {
    for (int64_t channel = 0; channel < width; channel += kTileColumns) {
        const int64_t columns = smaller(kTileColumns, width - channel);
        multiply_rows(scratch, scratch.powers, rows, kBlockKeys, value + channel * kBlockKeys, columns / 16);
        for (int64_t row = 0; row < rows; ++row) {
            const __m512 factor = _mm512_set1_ps(scratch.softmax.block_factor[row]);
            float* sums = scratch.sums + row * width + channel;
            for (int64_t i = 0; i < columns; i += 16) {
                const __m512 product = _mm512_cvtepi32_ps(_mm512_load_si512(scratch.integers + row * kTileColumns + i));
                const __m512 scaled = _mm512_mul_ps(product, _mm512_load_ps(value_scale + channel + i));
                _mm512_store_ps(sums + i, _mm512_fmadd_ps(scaled, factor, _mm512_load_ps(sums + i)));
            }
        }
    }
}

// Tasks [first, last): blocks of queries of the group's heads.
template <typename Input>
void attend_int8(const AttentionJob& job, int64_t first, int64_t last) {
    alignas(64) Int8Scratch scratch;
    const int64_t width = padded(job.width);
    for (int64_t task = first; task < last; ++task) {
        const Queries queries(job, task, kInt8Rows);
        const Head<int8_t> head = head_of<int8_t>(job, queries.head);
        for (float& poison : scratch.poison) poison = *head.poison;
        std::memset(scratch.sums, 0, queries.rows * width * sizeof(float));
        scratch.softmax.begin();
        quantize_queries(job, queries.input<Input>(job), queries.rows, scratch.query, scratch.scale, scratch.poison);
        for (int64_t block = 0; block < queries.end_block; ++block) {
            if (head.keep[block] == 0) continue;
            const int64_t start = block * kBlockKeys;
            multiply_rows(scratch, scratch.query, queries.rows, width, head.key + start * width, 4);
            for (int64_t row = 0; row < queries.rows; ++row) {
                const uint64_t keep = head.keep[block];
                const uint64_t bits = job.causal ? causal_bits(keep, queries.top + row - start) : keep;
                uint8_t* powers = scratch.powers + row * kBlockKeys;
                float *highest = scratch.softmax.block_highest + row, *sum = scratch.softmax.block_sum + row;
                if (bits != 0) {
                    soften_int8_row(scratch.integers + row * kTileColumns, head.key_sum + start, head.key_scale + start,
                                    scratch.scale[row], bits, powers, highest, sum);
                } else {
                    std::memset(powers, 0, kBlockKeys);
                    *highest = kNoScore;
                    *sum = 0.0f;
                }
            }
            if (scratch.softmax.meet_block()) scratch.softmax.rescale(scratch.sums, queries.rows, width);
            scratch.softmax.add_block();
            add_int8_values(scratch, queries.rows, width, head.value + start * width, head.value_scale + block * width);
        }
        write_attention(job, scratch.softmax, scratch.sums, head.value_mean, scratch.poison, queries.rows,
                        queries.output<Input>(job));
    }
}
