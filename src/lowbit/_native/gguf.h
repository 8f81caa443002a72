// Decoding the blocks of GGUF files, and products with few rows; included once per instruction set by lowbit_cpu.cpp
// after kernels.h, inside the same namespace.
//
// Layouts and the order of operations are those of ggml's dequantize_row_*, so that the float32 values are equal bit for
// bit. A decoder takes one block and writes its elements.

LOWBIT_INLINE float half_at(const uint8_t* bytes) {
    Half value;
    std::memcpy(&value.bits, bytes, sizeof value.bits);
#ifdef LOWBIT_AVX512
    return _mm512_cvtss_f32(_mm512_cvtph_ps(_mm256_castsi128_si256(_mm_cvtsi32_si128(value.bits))));
#else
    return widen(value);
#endif
}

#ifdef LOWBIT_AVX512
// What compilers make of the loops below is several times slower.
LOWBIT_INLINE __m128i load_bytes(const uint8_t* from) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(from)); }

LOWBIT_INLINE __m128i low_nibbles(__m128i bytes) { return _mm_and_si128(bytes, _mm_set1_epi8(15)); }

LOWBIT_INLINE __m128i high_nibbles(__m128i bytes) { return low_nibbles(_mm_srli_epi16(bytes, 4)); }

LOWBIT_INLINE __m512 codes_from(float first) {
    const __m512 steps = _mm512_set_ps(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    return _mm512_add_ps(steps, _mm512_set1_ps(first));
}

// The values of sixteen codes 0 to 15.
LOWBIT_INLINE void look_up(__m512 values, __m128i codes, float* out) {
    _mm512_storeu_ps(out, _mm512_permutexvar_ps(_mm512_cvtepu8_epi32(codes), values));
}

// The values of sixteen codes 0 to 31.
LOWBIT_INLINE void look_up(__m512 low, __m512 high, __m128i codes, float* out) {
    _mm512_storeu_ps(out, _mm512_permutex2var_ps(low, _mm512_cvtepu8_epi32(codes), high));
}

LOWBIT_INLINE __m512 scaled(float scale, __m512 codes, float minimum) {
    return _mm512_sub_ps(_mm512_mul_ps(_mm512_set1_ps(scale), codes), _mm512_set1_ps(minimum));
}
#endif

struct PlainF32 {
    static constexpr int elements = 1, bytes = 4;
    LOWBIT_INLINE void decode(const uint8_t* block, float* out) { std::memcpy(out, block, 4); }
};

struct PlainF16 {
    static constexpr int elements = 1, bytes = 2;
    LOWBIT_INLINE void decode(const uint8_t* block, float* out) { *out = half_at(block); }
};

struct PlainBF16 {
    static constexpr int elements = 1, bytes = 2;
    LOWBIT_INLINE void decode(const uint8_t* block, float* out) {
        BFloat16 value;
        std::memcpy(&value.bits, block, 2);
        *out = widen(value);
    }
};

struct BlockQ8_0 {
    static constexpr int elements = 32, bytes = 34;
    LOWBIT_INLINE void decode(const uint8_t* block, float* out) {
        const float d = half_at(block);
#ifdef LOWBIT_AVX512
        for (int i = 0; i < 32; i += 16) {
            const __m512 q = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(load_bytes(block + 2 + i)));
            _mm512_storeu_ps(out + i, _mm512_mul_ps(q, _mm512_set1_ps(d)));
        }
#else
        const auto* q = reinterpret_cast<const int8_t*>(block + 2);
        for (int i = 0; i < 32; ++i) out[i] = static_cast<float>(q[i]) * d;
#endif
    }
};

struct BlockQ4_0 {
    static constexpr int elements = 32, bytes = 18;
    LOWBIT_INLINE void decode(const uint8_t* block, float* out) {
        const float d = half_at(block);
#ifdef LOWBIT_AVX512
        const __m512 values = _mm512_mul_ps(_mm512_set1_ps(d), codes_from(-8));
        const __m128i bytes = load_bytes(block + 2);
        look_up(values, low_nibbles(bytes), out);
        look_up(values, high_nibbles(bytes), out + 16);
#else
        const uint8_t* q = block + 2;
        for (int i = 0; i < 16; ++i) out[i] = d * static_cast<float>(static_cast<int>(q[i] & 15) - 8);
        for (int i = 0; i < 16; ++i) out[i + 16] = d * static_cast<float>(static_cast<int>(q[i] >> 4) - 8);
#endif
    }
};

struct BlockQ4_1 {
    static constexpr int elements = 32, bytes = 20;
    LOWBIT_INLINE void decode(const uint8_t* block, float* out) {
        const float d = half_at(block), m = half_at(block + 2);
        const uint8_t* q = block + 4;
        for (int i = 0; i < 16; ++i) out[i] = d * static_cast<float>(q[i] & 15) + m;
        for (int i = 0; i < 16; ++i) out[i + 16] = d * static_cast<float>(q[i] >> 4) + m;
    }
};

// Bit i of four bytes, as 16.
LOWBIT_INLINE int fifth_bit(uint32_t bits, int i) { return static_cast<int>((bits >> i) & 1u) << 4; }

struct BlockQ5_0 {
    static constexpr int elements = 32, bytes = 22;
    LOWBIT_INLINE void decode(const uint8_t* block, float* out) {
        const float d = half_at(block);
        uint32_t high;
        std::memcpy(&high, block + 2, 4);
        const uint8_t* q = block + 6;
        for (int i = 0; i < 16; ++i) out[i] = d * static_cast<float>(((q[i] & 15) | fifth_bit(high, i)) - 16);
        for (int i = 0; i < 16; ++i) out[i + 16] = d * static_cast<float>(((q[i] >> 4) | fifth_bit(high, i + 16)) - 16);
    }
};

struct BlockQ5_1 {
    static constexpr int elements = 32, bytes = 24;
    LOWBIT_INLINE void decode(const uint8_t* block, float* out) {
        const float d = half_at(block), m = half_at(block + 2);
        uint32_t high;
        std::memcpy(&high, block + 4, 4);
        const uint8_t* q = block + 8;
        for (int i = 0; i < 16; ++i) out[i] = d * static_cast<float>((q[i] & 15) | fifth_bit(high, i)) + m;
        for (int i = 0; i < 16; ++i) out[i + 16] = d * static_cast<float>((q[i] >> 4) | fifth_bit(high, i + 16)) + m;
    }
};

struct BlockQ2_K {
    static constexpr int elements = 256, bytes = 84;
    LOWBIT_INLINE void decode(const uint8_t* block, float* out) {
        const float d = half_at(block + 80), dmin = half_at(block + 82);
        for (int group = 0; group < 16; ++group) {
            const float scale = d * static_cast<float>(block[group] & 15);
            const float minimum = dmin * static_cast<float>(block[group] >> 4);
            const uint8_t* q = block + 16 + group / 8 * 32 + group % 2 * 16;
            const int shift = group % 8 / 2 * 2;
            for (int i = 0; i < 16; ++i)
                out[16 * group + i] = scale * static_cast<float>((q[i] >> shift) & 3) - minimum;
        }
    }
};

struct BlockQ3_K {
    static constexpr int elements = 256, bytes = 110;
    LOWBIT_INLINE void decode(const uint8_t* block, float* out) {
        const float d = half_at(block + 108);
        const uint8_t* scales = block + 96;
        for (int group = 0; group < 16; ++group) {
            const int low = (scales[group % 8] >> (group / 8 * 4)) & 15;
            const int high = (scales[8 + group % 4] >> (group / 4 * 2)) & 3;
            const float scale = d * static_cast<float>((low | (high << 4)) - 32);
            const uint8_t* q = block + 32 + group / 8 * 32 + group % 2 * 16;
            const uint8_t* mask = block + group % 2 * 16;
            const int shift = group % 8 / 2 * 2, bit = group / 2;
            for (int i = 0; i < 16; ++i)
                out[16 * group + i] = scale * static_cast<float>(((q[i] >> shift) & 3) - (((mask[i] >> bit) & 1) ? 0 : 4));
        }
    }
};

// The six-bit scales and minimums of the eight groups of Q4_K and Q5_K, times d and dmin.
LOWBIT_INLINE void scales_and_minimums(const uint8_t* block, float* scales, float* minimums) {
    const float d = half_at(block), dmin = half_at(block + 2);
    uint32_t words[3], unpacked[4];
    std::memcpy(words, block + 4, sizeof words);
    unpacked[0] = words[0] & 0x3f3f3f3fu;
    unpacked[1] = (words[2] & 0x0f0f0f0fu) | (((words[0] >> 6) & 0x03030303u) << 4);
    unpacked[2] = words[1] & 0x3f3f3f3fu;
    unpacked[3] = ((words[2] >> 4) & 0x0f0f0f0fu) | (((words[1] >> 6) & 0x03030303u) << 4);
    uint8_t six_bits[16];
    std::memcpy(six_bits, unpacked, sizeof six_bits);
    for (int i = 0; i < 8; ++i) scales[i] = d * static_cast<float>(six_bits[i]);
    for (int i = 0; i < 8; ++i) minimums[i] = dmin * static_cast<float>(six_bits[8 + i]);
}

struct BlockQ4_K {
    static constexpr int elements = 256, bytes = 144;
    LOWBIT_INLINE void decode(const uint8_t* block, float* out) {
        float scales[8], minimums[8];
        scales_and_minimums(block, scales, minimums);
        for (int pair = 0; pair < 4; ++pair) {
            const float scale0 = scales[2 * pair], minimum0 = minimums[2 * pair];
            const float scale1 = scales[2 * pair + 1], minimum1 = minimums[2 * pair + 1];
            const uint8_t* q = block + 16 + 32 * pair;
            float* to = out + 64 * pair;
#ifdef LOWBIT_AVX512
            const __m512 values0 = scaled(scale0, codes_from(0), minimum0);
            const __m512 values1 = scaled(scale1, codes_from(0), minimum1);
            for (int i = 0; i < 32; i += 16) {
                const __m128i bytes = load_bytes(q + i);
                look_up(values0, low_nibbles(bytes), to + i);
                look_up(values1, high_nibbles(bytes), to + i + 32);
            }
#else
            for (int i = 0; i < 32; ++i) to[i] = scale0 * static_cast<float>(q[i] & 15) - minimum0;
            for (int i = 0; i < 32; ++i) to[i + 32] = scale1 * static_cast<float>(q[i] >> 4) - minimum1;
#endif
        }
    }
};

struct BlockQ5_K {
    static constexpr int elements = 256, bytes = 176;
    LOWBIT_INLINE void decode(const uint8_t* block, float* out) {
        float scales[8], minimums[8];
        scales_and_minimums(block, scales, minimums);
        const uint8_t* high = block + 16;
        for (int pair = 0; pair < 4; ++pair) {
            const float scale0 = scales[2 * pair], minimum0 = minimums[2 * pair];
            const float scale1 = scales[2 * pair + 1], minimum1 = minimums[2 * pair + 1];
            const uint8_t* q = block + 48 + 32 * pair;
            float* to = out + 64 * pair;
            const int bit = 2 * pair;
#ifdef LOWBIT_AVX512
            const __m512 low0 = scaled(scale0, codes_from(0), minimum0), high0 = scaled(scale0, codes_from(16), minimum0);
            const __m512 low1 = scaled(scale1, codes_from(0), minimum1), high1 = scaled(scale1, codes_from(16), minimum1);
            const __m128i sixteen = _mm_set1_epi8(16);
            for (int i = 0; i < 32; i += 16) {
                const __m128i bytes = load_bytes(q + i), fifth = load_bytes(high + i);
                // The group's bit, moved to 16; what comes in from the neighbouring byte is masked away.
                const __m128i bit0 = _mm_and_si128(_mm_slli_epi16(_mm_srli_epi16(fifth, bit), 4), sixteen);
                const __m128i bit1 = _mm_and_si128(_mm_slli_epi16(_mm_srli_epi16(fifth, bit + 1), 4), sixteen);
                look_up(low0, high0, _mm_or_si128(low_nibbles(bytes), bit0), to + i);
                look_up(low1, high1, _mm_or_si128(high_nibbles(bytes), bit1), to + i + 32);
            }
#else
            for (int i = 0; i < 32; ++i)
                to[i] = scale0 * static_cast<float>((q[i] & 15) | (((high[i] >> bit) & 1) << 4)) - minimum0;
            for (int i = 0; i < 32; ++i)
                to[i + 32] = scale1 * static_cast<float>((q[i] >> 4) | (((high[i] >> (bit + 1)) & 1) << 4)) - minimum1;
#endif
        }
    }
};

struct BlockQ6_K {
    static constexpr int elements = 256, bytes = 210;
    LOWBIT_INLINE void decode(const uint8_t* block, float* out) {
        const float d = half_at(block + 208);
        float scales[16];
        for (int i = 0; i < 16; ++i) scales[i] = d * static_cast<float>(static_cast<int8_t>(block[192 + i]));
#ifdef LOWBIT_AVX512
#pragma GCC unroll 16
#endif
        for (int group = 0; group < 16; ++group) {
            const int half = group / 8, quarter = group % 8 / 2;
            const float scale = scales[group];
            const uint8_t* low = block + 64 * half + quarter % 2 * 32 + group % 2 * 16;
            const uint8_t* high = block + 128 + 32 * half + group % 2 * 16;
            const int low_shift = quarter / 2 * 4, high_shift = 2 * quarter;
            float* to = out + 16 * group;
#ifdef LOWBIT_AVX512
            const __m128i low_bits = low_nibbles(_mm_srli_epi16(load_bytes(low), low_shift));
            const __m128i two = _mm_and_si128(_mm_srli_epi16(load_bytes(high), high_shift), _mm_set1_epi8(3));
            const __m512i code = _mm512_cvtepu8_epi32(_mm_or_si128(low_bits, _mm_slli_epi16(two, 4)));
            const __m512 value = _mm512_cvtepi32_ps(_mm512_sub_epi32(code, _mm512_set1_epi32(32)));
            _mm512_storeu_ps(to, _mm512_mul_ps(_mm512_set1_ps(scale), value));
#else
            for (int i = 0; i < 16; ++i) {
                const int code = ((low[i] >> low_shift) & 15) | (((high[i] >> high_shift) & 3) << 4);
                to[i] = scale * static_cast<float>(code - 32);
            }
#endif
        }
    }
};

constexpr float kIq4Values[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};

struct BlockIQ4_NL {
    static constexpr int elements = 32, bytes = 18;
    LOWBIT_INLINE void decode(const uint8_t* block, float* out) {
        const float d = half_at(block);
        const uint8_t* q = block + 2;
        for (int i = 0; i < 16; ++i) out[i] = d * kIq4Values[q[i] & 15];
        for (int i = 0; i < 16; ++i) out[i + 16] = d * kIq4Values[q[i] >> 4];
    }
};

struct BlockIQ4_XS {
    static constexpr int elements = 256, bytes = 136;
    LOWBIT_INLINE void decode(const uint8_t* block, float* out) {
        const float d = half_at(block);
        for (int group = 0; group < 8; ++group) {
            const int low = (block[4 + group / 2] >> (group % 2 * 4)) & 15;
            const int high = (block[2 + group / 4] >> (group % 4 * 2)) & 3;
            const float scale = d * static_cast<float>((low | (high << 4)) - 32);
            const uint8_t* q = block + 8 + 16 * group;
            float* to = out + 32 * group;
            for (int i = 0; i < 16; ++i) to[i] = scale * kIq4Values[q[i] & 15];
            for (int i = 0; i < 16; ++i) to[i + 16] = scale * kIq4Values[q[i] >> 4];
        }
    }
};

// Elements [0, count) of a row, count a multiple of the block.
template <typename Block>
LOWBIT_INLINE void decode_row(const uint8_t* input, int64_t count, float* output) {
    for (int64_t i = 0; i < count; i += Block::elements, input += Block::bytes) Block::decode(input, output + i);
}

template <typename Block, typename Output>
LOWBIT_INLINE void decode_row(const uint8_t* input, int64_t count, Output* output) {
    constexpr int kPiece = 256;
    float values[kPiece];
    for (int64_t first = 0; first < count; first += kPiece) {
        const int64_t size = smaller(kPiece, count - first);
        decode_row<Block>(input + first / Block::elements * Block::bytes, size, values);
        for (int64_t i = 0; i < size; ++i) narrow(values[i], output[first + i]);
    }
}

// Rows [first, last).
template <typename Block, typename Output>
void decode_blocks(const GgufJob& job, int64_t first, int64_t last) {
    const int64_t row_bytes = job.columns / Block::elements * Block::bytes;
    for (int64_t row = first; row < last; ++row)
        decode_row<Block>(job.input + row * row_bytes, job.columns, static_cast<Output*>(job.output) + row * job.columns);
}

#ifdef LOWBIT_AVX512
constexpr int kGgufRows = 4;       // output channels of a task: decoded side by side
constexpr int kGgufTile = 6;       // rows of x multiplied at once: 24 accumulators, 4 weights and a value of x
constexpr int kGgufDepth = 2048;   // decoded at once: 32 KiB stay in the first-level cache

template <int Rows>
LOWBIT_INLINE void multiply_rows(const float (*weight)[kGgufDepth], const float* x, int64_t stride, int64_t depth,
                                 float (*sums)[kGgufRows]) {
    __m512 totals[Rows][kGgufRows];
#pragma GCC unroll 8
    for (int row = 0; row < Rows; ++row)
#pragma GCC unroll 8
        for (int channel = 0; channel < kGgufRows; ++channel) totals[row][channel] = _mm512_setzero_ps();
    for (int64_t i = 0; i < depth; i += 16) {
        __m512 weights[kGgufRows];
#pragma GCC unroll 8
        for (int channel = 0; channel < kGgufRows; ++channel) weights[channel] = _mm512_loadu_ps(weight[channel] + i);
#pragma GCC unroll 8
        for (int row = 0; row < Rows; ++row) {
            const __m512 value = _mm512_loadu_ps(x + row * stride + i);
#pragma GCC unroll 8
            for (int channel = 0; channel < kGgufRows; ++channel)
                totals[row][channel] = _mm512_fmadd_ps(value, weights[channel], totals[row][channel]);
        }
    }
#pragma GCC unroll 8
    for (int row = 0; row < Rows; ++row)
#pragma GCC unroll 8
        for (int channel = 0; channel < kGgufRows; ++channel)
            sums[row][channel] += _mm512_reduce_add_ps(totals[row][channel]);
}

using MultiplyRows = void (*)(const float (*)[kGgufDepth], const float*, int64_t, int64_t, float (*)[kGgufRows]);

template <int Rows>
void multiply_gguf_rows(const float (*weight)[kGgufDepth], const float* x, int64_t stride, int64_t depth,
                        float (*sums)[kGgufRows]) {
    multiply_rows<Rows>(weight, x, stride, depth, sums);
}

constexpr MultiplyRows kMultiplyRows[kGgufTile] = {multiply_gguf_rows<1>, multiply_gguf_rows<2>, multiply_gguf_rows<3>,
                                                   multiply_gguf_rows<4>, multiply_gguf_rows<5>, multiply_gguf_rows<6>};

// Tasks [first, last) of four output channels. columns % 32 == 0.
template <typename Block, typename Output>
void multiply_blocks(const GgufProductJob& job, int64_t first, int64_t last) {
    alignas(64) float weight[kGgufRows][kGgufDepth];
    std::vector<float> storage(job.rows * kGgufRows);
    auto* sums = reinterpret_cast<float(*)[kGgufRows]>(storage.data());
    const int64_t row_bytes = job.columns / Block::elements * Block::bytes;
    for (int64_t task = first; task < last; ++task) {
        const int64_t channel = task * kGgufRows;
        const int64_t channels = smaller(kGgufRows, job.features - channel);
        std::memset(storage.data(), 0, storage.size() * sizeof(float));
        for (int64_t start = 0; start < job.columns; start += kGgufDepth) {
            const int64_t depth = smaller(kGgufDepth, job.columns - start);
            for (int64_t i = 0; i < channels; ++i)
                decode_row<Block>(job.input + (channel + i) * row_bytes + start / Block::elements * Block::bytes, depth,
                                  weight[i]);
            for (int64_t row = 0; row < job.rows; row += kGgufTile) {
                const int64_t count = smaller(kGgufTile, job.rows - row);
                kMultiplyRows[count - 1](weight, job.x + row * job.columns + start, job.columns, depth, sums + row);
            }
        }
        for (int64_t row = 0; row < job.rows; ++row)
            for (int64_t i = 0; i < channels; ++i) {
                const float value = job.bias ? sums[row][i] + job.bias[channel + i] : sums[row][i];
                narrow(value, static_cast<Output*>(job.output)[row * job.features + channel + i]);
            }
    }
}
#endif

#ifdef LOWBIT_AVX512
#define LOWBIT_GGUF_PRODUCTS(Block) {multiply_blocks<Block, float>, multiply_blocks<Block, BFloat16>, multiply_blocks<Block, Half>}
#else
#define LOWBIT_GGUF_PRODUCTS(Block) {nullptr, nullptr, nullptr}
#endif
#define LOWBIT_GGUF_ENTRY(Number, Block)                                                               \
    {Number, Block::elements, Block::bytes,                                                            \
     {decode_blocks<Block, float>, decode_blocks<Block, BFloat16>, decode_blocks<Block, Half>},        \
     LOWBIT_GGUF_PRODUCTS(Block)}

// By ggml's number of the type.
const GgufKernels gguf_kernels[] = {
    LOWBIT_GGUF_ENTRY(0, PlainF32),   LOWBIT_GGUF_ENTRY(1, PlainF16),   LOWBIT_GGUF_ENTRY(30, PlainBF16),
    LOWBIT_GGUF_ENTRY(8, BlockQ8_0),  LOWBIT_GGUF_ENTRY(2, BlockQ4_0),  LOWBIT_GGUF_ENTRY(3, BlockQ4_1),
    LOWBIT_GGUF_ENTRY(6, BlockQ5_0),  LOWBIT_GGUF_ENTRY(7, BlockQ5_1),  LOWBIT_GGUF_ENTRY(10, BlockQ2_K),
    LOWBIT_GGUF_ENTRY(11, BlockQ3_K), LOWBIT_GGUF_ENTRY(12, BlockQ4_K), LOWBIT_GGUF_ENTRY(13, BlockQ5_K),
    LOWBIT_GGUF_ENTRY(14, BlockQ6_K), LOWBIT_GGUF_ENTRY(20, BlockIQ4_NL), LOWBIT_GGUF_ENTRY(23, BlockIQ4_XS),
};
constexpr int kGgufTypes = sizeof gguf_kernels / sizeof gguf_kernels[0];
#undef LOWBIT_GGUF_ENTRY
#undef LOWBIT_GGUF_PRODUCTS
