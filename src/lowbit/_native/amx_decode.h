// Weights of 8 and 4 bits decoded to bfloat16 for amx_product.h, a channel's inputs at a time, in their own order.
//
// A value is what weight_only.h's is, rounded once more. Codes of 4 bits are looked up in a register that holds 32 words:
// one block's 16 values twice, or those of two blocks of 16 inputs.

constexpr int64_t kWords = 32;  // bfloat16 in a register

using avx512::E2M1;
using avx512::Int4;

LOWBIT_INLINE __m512i round_pair(__m512 low, __m512 high) {
    const __m512bh rounded = _mm512_cvtne2ps_pbh(high, low);
    return reinterpret_cast<const __m512i&>(rounded);
}

// Inputs [first, first + count), first a multiple of kChunk.
template <typename Code>
void decode_bytes(const WeightJob& job, int64_t channel, int64_t first, int64_t count, BFloat16* output) {
    const Code* codes = avx512::channel_codes<Code>(job, channel) + first;
    float scales[avx512::kChunk / 16 + 1];
    for (int64_t done = 0; done < count; done += avx512::kChunk) {
        const int64_t part = smaller(avx512::kChunk, count - done);
        avx512::spread_scales(job, channel, first + done, part, scales);
        for (int64_t i = 0; i < part; i += kWords) {
            __m512 values[2];
            avx512::decode_steps(codes, done + i, part - i, values);
            const float* scale = scales + i / 16;
            values[0] = _mm512_mul_ps(values[0], _mm512_set1_ps(scale[0]));
            values[1] = _mm512_mul_ps(values[1], _mm512_set1_ps(scale[1]));
            _mm512_storeu_si512(output + done + i, round_pair(values[0], values[1]));
        }
    }
}

// 32 codes of 16 bytes as indices of words, of which the instruction looks at the low five bits; the fifth is not a code's.
LOWBIT_INLINE __m512i pair_indices(const uint8_t* codes) {
    const __m512i bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)));
    return _mm512_or_si512(bytes, _mm512_slli_epi32(bytes, 12));
}

template <typename Code, int64_t Block>
LOWBIT_INLINE void decode_pairs(const WeightJob& job, int64_t channel, int64_t first, int64_t count, BFloat16* output) {
    const auto* codes = reinterpret_cast<const uint8_t*>(avx512::channel_codes<Code>(job, channel)) + first / 2;
    const __m512i second_half = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi16(16), 1);
    for (int64_t chunk = 0; chunk < count; chunk += avx512::kChunk) {
        const int64_t part = smaller(avx512::kChunk, count - chunk), block = Block ? Block : smaller(job.block_columns, part);
        avx512::BlockScales scales;
        avx512::load_block_scales<Code>(job, channel, first + chunk, blocks(part, block), scales);
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

// Ask memory for the same inputs of the next channel: the hardware's own prefetching ends with a page.
LOWBIT_INLINE void prefetch_next(const uint8_t* codes, int64_t row_bytes, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += 64) _mm_prefetch(reinterpret_cast<const char*>(codes) + row_bytes + i, _MM_HINT_T0);
}

// What AmxJob::decode is for each code.
template <typename Code>
void decode_weight(const void* weight, int64_t channel, int64_t first, int64_t count, BFloat16* output) {
    const auto& job = *static_cast<const WeightJob*>(weight);
    const auto* codes = reinterpret_cast<const uint8_t*>(avx512::channel_codes<Code>(job, channel));
    prefetch_next(codes + first * avx512::kBits<Code> / 8, job.depth * avx512::kBits<Code> / 8, count * avx512::kBits<Code> / 8);
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
    prefetch_next(from, rows.row_bytes, count / rows.kernels->elements * rows.kernels->bytes);
    alignas(64) float values[kDepthSteps * kWords];
    rows.kernels->decode[0]({from, count, values}, 0, 1);
    for (int64_t i = 0; i < count; i += kWords)
        _mm512_storeu_si512(output + i, round_pair(_mm512_load_ps(values + i), _mm512_load_ps(values + i + 16)));
}
