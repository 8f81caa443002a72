// Weights of 8 and 4 bits decoded to bfloat16 for amx_product.h, a channel's inputs at a time, in their own order.
//
// A value is what weight_only.h's is, rounded once more. Codes of 4 bits are looked up in a register that holds 32 words:
// one block's 16 values twice, or those of two blocks of 16 inputs.

constexpr int64_t kWords = 32;  // bfloat16 in a register
constexpr int64_t kFewInputs = 512;  // as many as are decoded at once for few rows, at most

using avx512::E2M1;
using avx512::Int4;

LOWBIT_INLINE __m512i round_pair(__m512 low, __m512 high) {
    const __m512bh rounded = _mm512_cvtne2ps_pbh(high, low);
    return reinterpret_cast<const __m512i&>(rounded);
}

// Whole registers of codes with a scale for each 16; returns how many of `count` were decoded.
LOWBIT_INLINE int64_t decode_whole(const Int8* codes, int64_t count, const float* scales, BFloat16* output) {
    int64_t i = 0;
    for (; i + kWords <= count; i += kWords) {
        __m512 values[2];
        for (int half = 0; half < 2; ++half) {
            const auto* from = reinterpret_cast<const __m128i*>(codes + i + 16 * half);
            const __m512 wide = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(from)));
            values[half] = _mm512_mul_ps(wide, _mm512_set1_ps(scales[i / 16 + half]));
        }
        _mm512_storeu_si512(output + i, round_pair(values[0], values[1]));
    }
    return i;
}

// As decode_as_half of weight_only.h: none if there is a NaN, or a scale of which 256 times is not finite.
LOWBIT_INLINE int64_t decode_whole(const E4M3* codes, int64_t count, const float* scales, BFloat16* output) {
    alignas(64) float factors[avx512::kChunk / 16];
    const __m512i bits = _mm512_set1_epi16(static_cast<int16_t>(0xbf80));
    __m512i largest_half = _mm512_setzero_si512();
    int64_t i = 0;
    for (; i < count / 16; i += 16) {
        const __mmask16 mask = column_mask(count / 16 - i);
        const __m512 factor = _mm512_mul_ps(_mm512_maskz_loadu_ps(mask, scales + i), _mm512_set1_ps(256.0f));
        if (_mm512_cmp_ps_mask(_mm512_abs_ps(factor), _mm512_set1_ps(3e38f), _CMP_NLT_UQ)) return 0;
        _mm512_store_ps(factors + i, factor);
    }
    for (i = 0; i + kWords <= count; i += kWords) {
        const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + i));
        const __m512i half = _mm512_and_si512(_mm512_slli_epi16(_mm512_cvtepi8_epi16(bytes), 7), bits);
        largest_half = _mm512_max_epu16(largest_half, _mm512_slli_epi16(half, 1));  // without the sign
        const __m512 low = _mm512_cvtph_ps(_mm512_castsi512_si256(half));
        const __m512 high = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(half, 1));
        const __m512 scaled = _mm512_mul_ps(high, _mm512_set1_ps(factors[i / 16 + 1]));
        _mm512_storeu_si512(output + i, round_pair(_mm512_mul_ps(low, _mm512_set1_ps(factors[i / 16])), scaled));
    }
    return _mm512_cmpeq_epi16_mask(largest_half, _mm512_set1_epi16(0x7f << 8)) ? 0 : i;
}

// Inputs [first, first + count), first a multiple of kChunk.
template <typename Code>
void decode_bytes(const WeightJob& job, int64_t channel, int64_t first, int64_t count, BFloat16* output) {
    const Code* codes = avx512::channel_codes<Code>(job, channel) + first;
    float scales[avx512::kChunk / 16 + 1];
    for (int64_t done = 0; done < count; done += avx512::kChunk) {
        const int64_t part = smaller(avx512::kChunk, count - done);
        avx512::spread_scales(job, channel, first + done, part, scales);
        for (int64_t i = decode_whole(codes + done, part, scales, output + done); i < part; i += kWords) {
            __m512 values[2];
            avx512::decode_steps(codes, done + i, part - i, values);
            values[0] = _mm512_mul_ps(values[0], _mm512_set1_ps(scales[i / 16]));
            values[1] = _mm512_mul_ps(values[1], _mm512_set1_ps(scales[i / 16 + 1]));
            _mm512_storeu_si512(output + done + i, round_pair(values[0], values[1]));
        }
    }
}

// 32 codes of 16 bytes as indices of words, of which the instruction looks at the low five bits: what is above is not theirs.
LOWBIT_INLINE __m512i pair_indices(const uint8_t* codes) {
    const __m512i fields = _mm512_cvtepu16_epi64(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)));
    return _mm512_multishift_epi64_epi8(_mm512_set1_epi64(0x000c000800040000), fields);
}

template <typename Code, int64_t Block>
LOWBIT_INLINE void decode_pairs(const WeightJob& job, int64_t channel, int64_t first, int64_t count, BFloat16* output) {
    const auto* codes = reinterpret_cast<const uint8_t*>(avx512::channel_codes<Code>(job, channel)) + first / 2;
    const __m512i second_half = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi16(16), 1);
    for (int64_t chunk = 0; chunk < count; chunk += avx512::kChunk) {
        const int64_t part = smaller(avx512::kChunk, count - chunk), block = Block ? Block : smaller(job.block_columns, part);
        avx512::BlockScales scales;
        avx512::load_block_scales<Code>(job, channel, first + chunk, avx512::quotient_up(part, block), scales);
        for (int64_t i = 0, at = 0; i < part; i += Block == 16 ? kWords : block, at += Block == 16 ? 2 : 1) {
            __m512 tables[2];
            for (int half = 0; half < (Block == 16 ? 2 : 1); ++half) {
                const __m512 table = avx512::table_of(Code{}, scales.zeros[Block == 16 ? 0 : at]);
                tables[half] = _mm512_mul_ps(table, _mm512_set1_ps(scales.scales[at + half]));
            }
            if (Block != 16) tables[1] = tables[0];
            const __m512i words = round_pair(tables[0], tables[1]);
            for (int64_t j = i; j < i + (Block ? kWords : block); j += kWords, codes += kWords / 2) {
                __m512i indices = pair_indices(codes);
                if (Block == 16)  // (indices & 15) | second_half
                    indices = _mm512_ternarylogic_epi32(indices, _mm512_set1_epi16(15), second_half, 0xea);
                _mm512_storeu_si512(output + chunk + j, _mm512_permutexvar_epi16(indices, words));
            }
        }
    }
}

// Through float32, for what the others are not made for.
template <typename Code>
void decode_any(const WeightJob& job, int64_t channel, int64_t first, int64_t count, BFloat16* output) {
    alignas(64) float values[avx512::kChunk];
    for (int64_t done = 0; done < count; done += avx512::kChunk) {
        const int64_t part = smaller(avx512::kChunk, count - done);
        avx512::decode_chunk(job, channel, first + done, part, values, Code{});
        for (int64_t i = 0; i < part; i += kWords)
            _mm512_storeu_si512(output + done + i, round_pair(_mm512_load_ps(values + i), _mm512_load_ps(values + i + 16)));
    }
}

// int4 in groups that a chunk is not a multiple of; decode_chunk gives of each 32 inputs the even ones first.
void decode_split(const WeightJob& job, int64_t channel, int64_t first, int64_t count, BFloat16* output) {
    alignas(64) float values[avx512::kChunk];
    for (int64_t done = 0; done < count; done += avx512::kChunk) {
        const int64_t part = smaller(avx512::kChunk, count - done);
        avx512::decode_chunk(job, channel, first + done, part, values, Int4{});
        for (int64_t i = 0; i < part; i += kWords) {
            const __m512i even = round_pair(_mm512_load_ps(values + i), _mm512_setzero_ps());
            const __m512i odd = round_pair(_mm512_load_ps(values + i + 16), _mm512_setzero_ps());
            const __m512i wide_even = _mm512_cvtepu16_epi32(_mm512_castsi512_si256(even));
            const __m512i wide_odd = _mm512_cvtepu16_epi32(_mm512_castsi512_si256(odd));
            _mm512_storeu_si512(output + done + i, _mm512_or_si512(wide_even, _mm512_slli_epi32(wide_odd, 16)));
        }
    }
}

// Ask memory for what is decoded soon: the hardware's own prefetching ends with a page.
LOWBIT_INLINE void prefetch(const uint8_t* from, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += 64) _mm_prefetch(reinterpret_cast<const char*>(from) + i, _MM_HINT_T0);
}

// What AmxJob::decode is for each code.
template <typename Code>
void decode_weight(const void* weight, int64_t channel, int64_t first, int64_t count, BFloat16* output) {
    const auto& job = *static_cast<const WeightJob*>(weight);
    const auto* codes = reinterpret_cast<const uint8_t*>(avx512::channel_codes<Code>(job, channel));
    constexpr int64_t kBits = avx512::kBits<Code>;
    // What is as far ahead as memory takes to answer: the next channel's, or of few inputs at once the third channel's; of 4
    // bits, of which the hardware fetches more by itself, the channel's own next ones.
    const int64_t ahead = count > kFewInputs ? job.depth : kBits == 8 ? 3 * job.depth : count;
    prefetch(codes + (first + ahead) * kBits / 8, count * kBits / 8);
    if constexpr (avx512::kBits<Code> == 8) {
        if (avx512::has_even_blocks(job)) decode_bytes<Code>(job, channel, first, count, output);
        else decode_any<Code>(job, channel, first, count, output);
    } else if (std::is_same<Code, E2M1>::value && !avx512::has_whole_groups<Code>(job)) {
        decode_any<Code>(job, channel, first, count, output);
    } else if (job.block_columns == 16) {
        decode_pairs<Code, 16>(job, channel, first, count, output);
    } else if (job.block_columns == kWords) {
        decode_pairs<Code, kWords>(job, channel, first, count, output);
    } else if (avx512::has_whole_groups<Code>(job)) {
        decode_pairs<Code, 0>(job, channel, first, count, output);
    } else {
        decode_split(job, channel, first, count, output);
    }
}

constexpr decltype(AmxJob::decode) weight_decoders[4] = {decode_weight<Int8>, decode_weight<E4M3>, decode_weight<Int4>,
                                                         decode_weight<E2M1>};

struct GgufRows {
    const GgufKernels* kernels;
    const uint8_t* input;
    int64_t row_bytes;
};

void decode_gguf(const void* weight, int64_t row, int64_t first, int64_t count, BFloat16* output) {
    const auto& rows = *static_cast<const GgufRows*>(weight);
    const uint8_t* from = rows.input + row * rows.row_bytes + first / rows.kernels->elements * rows.kernels->bytes;
    prefetch(from + rows.row_bytes, count / rows.kernels->elements * rows.kernels->bytes);
    alignas(64) float values[kDepthSteps * kWords];
    rows.kernels->decode[0]({from, count, values}, 0, 1);
    for (int64_t i = 0; i < count; i += kWords)
        _mm512_storeu_si512(output + i, round_pair(_mm512_load_ps(values + i), _mm512_load_ps(values + i + 16)));
}
