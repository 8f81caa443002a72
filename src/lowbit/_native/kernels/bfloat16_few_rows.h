// Products of few rows of bfloat16 with weights that are decoded to it, by AVX512-BF16, whose instruction multiplies pairs of
// inputs and adds them to 16 sums.
//
// The sums of a register are those of one channel with 16 rows; a decoded pair is spread over them as it is loaded. Of up to
// eight rows two pairs are multiplied at once, with two sums for each row, of up to four rows four. Of 16 channels kFewInputs
// inputs are decoded into the first-level cache, for up to 16 rows while those before are multiplied: the units for both are
// different ones.
#ifndef LOWBIT_NATIVE_KERNELS_BFLOAT16_FEW_ROWS_H
#define LOWBIT_NATIVE_KERNELS_BFLOAT16_FEW_ROWS_H

#include "bfloat16_rows.h"
#include "../runtime.h"

LOWBIT_BEGIN(gemm)

using Sums = float[kMaxFewRows / kTileRows][kTileRows * kTileChannels];

struct FewRowsMemory {
    alignas(64) BFloat16 decoded[2][kTileChannels][kStride];
    alignas(64) Sums sums;
    alignas(64) Sums scaled;
};

// Pairs that are multiplied at once.
LOWBIT_INLINE int64_t pairs_at_once(const GemmArgs& job) {
    return job.rows <= kTileRows / 4 ? 4 : job.rows <= kTileRows / 2 ? 2 : 1;
}

LOWBIT_INLINE int64_t bytes_of_step(const GemmArgs& job) { return blocks(job.rows, kTileRows) * kTileBytes / pairs_at_once(job); }

// Steps [first, last) of 32 inputs -> [steps][blocks of 16 rows][16 pairs of inputs][16 rows][2], or
// [steps][16 / pairs at once][16 / pairs at once rows][pairs at once][2].
void transpose_rows(const GemmArgs& job, int64_t first, int64_t last) {
    const __m512i both = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    const __m512i both_halves = _mm512_setr_epi64(0, 8, 1, 9, 2, 10, 3, 11);
    uint8_t* to = job.tiles + first * bytes_of_step(job);
    for (int64_t step = first; step < last; ++step) {
        for (int64_t row = 0; row < job.rows; row += kTileRows) {
            alignas(64) int8_t turned[kTileRows * kStep];
            turn_step(job, step, row, turned);
            const auto two_pairs = [=](const int8_t* from) LOWBIT_INLINE_LAMBDA {
                return _mm512_permutex2var_epi32(_mm512_load_si512(from), both, _mm512_load_si512(from + kStep));
            };
            const int64_t pairs = pairs_at_once(job);
            for (const int8_t* from = turned; from < turned + sizeof turned; from += pairs * kStep, to += kStep) {
                __m512i inputs = pairs == 1 ? _mm512_load_si512(from) : two_pairs(from);
                if (pairs == 4) inputs = _mm512_permutex2var_epi64(inputs, both_halves, two_pairs(from + 2 * kStep));
                _mm512_store_si512(to, inputs);
            }
        }
    }
}

// Adjacent inputs of a channel, one pair in all lanes, or several in turn.
template <int kPairs>
LOWBIT_INLINE __m512bh spread(const BFloat16* inputs) {
    __m512i all;
    if constexpr (kPairs == 4) {
        all = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(inputs)));
    } else {
        typename std::conditional<kPairs == 2, int64_t, int32_t>::type bits;
        std::memcpy(&bits, inputs, sizeof bits);
        all = kPairs == 2 ? _mm512_set1_epi64(bits) : _mm512_set1_epi32(static_cast<int32_t>(bits));
    }
    return reinterpret_cast<const __m512bh&>(all);
}

// Adds the products of `steps` steps of 16 decoded channels and all rows to the sums, or to zero.
using StepsKernel = void (*)(const BFloat16* channels, const uint8_t* x, int64_t steps, bool accumulate, FewRowsMemory& memory);

template <int kBlocks, int kPairs>
LOWBIT_NOINLINE void multiply_steps(const BFloat16* channels, const uint8_t* x, int64_t steps, bool accumulate,
                                    FewRowsMemory& memory) {
    constexpr int kTogether = kBlocks == 1 ? 16 : kBlocks == 4 ? 4 : 8;  // as many channels as there are registers for
    constexpr int kRegisters = 16 / kPairs;
    for (int64_t channel = 0; channel < kTileChannels; channel += kTogether) {
        __m512 sums[kTogether][kBlocks];
#pragma GCC unroll 16
        for (int c = 0; c < kTogether; ++c)
#pragma GCC unroll 4
            for (int b = 0; b < kBlocks; ++b)
                sums[c][b] = accumulate ? _mm512_load_ps(memory.sums[b] + (channel + c) * 16) : _mm512_setzero_ps();
        const BFloat16* weight = channels + channel * kStride;
        const uint8_t* from = x;
        for (int64_t step = 0; step < steps; ++step, from += kBlocks * kRegisters * kStep) {
            for (int r = 0; r < kRegisters; ++r, weight += 2 * kPairs) {
                __m512bh inputs[kBlocks];
#pragma GCC unroll 4
                for (int b = 0; b < kBlocks; ++b) {
                    const __m512i bits = _mm512_load_si512(from + (b * kRegisters + r) * kStep);
                    inputs[b] = reinterpret_cast<const __m512bh&>(bits);
                }
#pragma GCC unroll 16
                for (int c = 0; c < kTogether; ++c) {
                    const __m512bh pairs = spread<kPairs>(weight + c * kStride);
#pragma GCC unroll 4
                    for (int b = 0; b < kBlocks; ++b) sums[c][b] = _mm512_dpbf16_ps(sums[c][b], inputs[b], pairs);
                }
            }
        }
#pragma GCC unroll 16
        for (int c = 0; c < kTogether; ++c)
#pragma GCC unroll 4
            for (int b = 0; b < kBlocks; ++b) _mm512_store_ps(memory.sums[b] + (channel + c) * 16, sums[c][b]);
    }
}

// By blocks of 16 rows.
constexpr StepsKernel kStepsKernels[] = {nullptr, multiply_steps<1, 1>, multiply_steps<2, 1>, multiply_steps<3, 1>,
                                         multiply_steps<4, 1>};

LOWBIT_INLINE StepsKernel steps_kernel(const GemmArgs& job) {
    const int64_t pairs = pairs_at_once(job);
    return pairs == 4 ? multiply_steps<1, 4> : pairs == 2 ? multiply_steps<1, 2> : kStepsKernels[blocks(job.rows, kTileRows)];
}

// Adds what the low-rank product adds to the channels from `channel` on.
LOWBIT_NOINLINE void add_low_rank(const GemmArgs& job, StepsKernel multiply, int64_t channel,
                                  BFloat16 (&copied)[kTileChannels][kStride], FewRowsMemory& memory) {
    for (int64_t step = 0; step * kWords < job.low_rank.rank; ++step) {
        for (int64_t i = 0; i < kTileChannels; ++i) _mm512_store_si512(copied[i], low_rank_inputs(job, channel + i, step));
        multiply(copied[0], job.low_rank.tiles + step * bytes_of_step(job), 1, true, memory);
    }
}

// Adds what was summed of each 16 rows, times its scale, to what was before, or to zero.
LOWBIT_INLINE void add_scaled(FewRowsMemory& memory, int64_t row_blocks, float scale, bool accumulate) {
    const float* from = memory.sums[0];
    float* to = memory.scaled[0];
    for (int64_t i = 0; i < row_blocks * kTileRows * kTileChannels; i += 16) {
        const __m512 before = accumulate ? _mm512_load_ps(to + i) : _mm512_setzero_ps();
        _mm512_store_ps(to + i, _mm512_fmadd_ps(_mm512_load_ps(from + i), _mm512_set1_ps(scale), before));
    }
}

LOWBIT_INLINE void write_sums(const GemmArgs& job, Sums& all_sums, int64_t column) {
    const int64_t pairs = pairs_at_once(job);
    const __m512i firsts = _mm512_mullo_epi32(lane_numbers(), _mm512_set1_epi32(static_cast<int>(pairs)));  // the index wraps
    for (int64_t channel = 0; pairs > 1 && channel < kTileChannels; ++channel) {
        float* sums = all_sums[0] + channel * 16;
        __m512 all = _mm512_load_ps(sums);
        all = _mm512_add_ps(all, _mm512_permute_ps(all, 0xb1));
        if (pairs == 4) all = _mm512_add_ps(all, _mm512_permute_ps(all, 0x4e));
        _mm512_store_ps(sums, _mm512_permutexvar_ps(firsts, all));
    }
    for (int64_t row = 0; row < job.rows; row += kTileRows) write_transposed(job, all_sums[row / kTileRows], row, column);
}

// As multiply_steps with whole chunks of up to 16 rows; `decode` is called for each channel to be decoded meanwhile, `scale` with
// the sums of each kScaled inputs, if it is not 0.
template <int kPairs, int64_t kScaled, typename Decode, typename Scale>
LOWBIT_INLINE void multiply_and_decode(const BFloat16* channels, const uint8_t* x, bool accumulate, FewRowsMemory& memory,
                                       Decode decode, Scale scale) {
    constexpr int kTogether = 16 / kPairs * kSteps / kTileChannels;
    __m512 sums[kTileChannels];
#pragma GCC unroll 16
    for (int c = 0; c < kTileChannels; ++c) sums[c] = accumulate ? _mm512_load_ps(memory.sums[0] + c * 16) : _mm512_setzero_ps();
    for (int64_t channel = 0; channel < kTileChannels; ++channel) {
        decode();
        for (int r = 0; r < kTogether; ++r, x += kStep, channels += 2 * kPairs) {
            const __m512i bits = _mm512_load_si512(x);
#pragma GCC unroll 16
            for (int c = 0; c < kTileChannels; ++c)
                sums[c] =
                    _mm512_dpbf16_ps(sums[c], reinterpret_cast<const __m512bh&>(bits), spread<kPairs>(channels + c * kStride));
        }
        if constexpr (kScaled > 0) {
            constexpr int64_t kChannelsOfScale = kTileChannels * kScaled / kFewInputs;
            if ((channel + 1) % kChannelsOfScale) continue;
#pragma GCC unroll 16
            for (int c = 0; c < kTileChannels; ++c) {
                _mm512_store_ps(memory.sums[0] + c * 16, sums[c]);
                sums[c] = _mm512_setzero_ps();
            }
            scale(channel / kChannelsOfScale * kScaled);
        }
    }
    if constexpr (kScaled > 0) return;
#pragma GCC unroll 16
    for (int c = 0; c < kTileChannels; ++c) _mm512_store_ps(memory.sums[0] + c * 16, sums[c]);
}

// Groups [first, last) of 16 channels, with all rows. `Channel` decodes inputs of a channel.
template <typename Channel>
void multiply_few_rows(const GemmArgs& job, int64_t first, int64_t last) {
    constexpr int64_t kScaled = Channel::kScaledInputs;
    auto& memory = scratch_object<FewRowsMemory>(Slot::kFewRows);
    const StepsKernel multiply = steps_kernel(job);
    const auto decode = channel_of<Channel>(job);
    const int64_t step_bytes = bytes_of_step(job), row_bytes = job.decoder->row_bytes;
    const int64_t chunk_bytes = bytes_of(*job.decoder, kFewInputs);
    Chunk chunk{last, 0}, next{first, 0};
    for (int64_t turn = 0; chunk.group < last || next.group < last; turn ^= 1) {
        const Chunk after = next_chunk(job, next, last);
        const int64_t inputs = smaller(kFewInputs, job.depth / 2 - chunk.input),
                      steps = chunk.group < last ? blocks(inputs, kWords) : 0;
        const Part decoded = part_of(job, next, last, kTileChannels), asked = part_of(job, after, last, kTileChannels);
        const bool is_whole = decoded.is_whole(kTileChannels) && asked.is_whole(kTileChannels);
        const char* codes = codes_at(*job.decoder, asked.channel, asked.input);
        const BFloat16* from = memory.decoded[turn][0];
        const uint8_t* x = job.tiles + chunk.input / kWords * step_bytes;
        BFloat16* to = memory.decoded[turn ^ 1][0];
        int64_t channel = decoded.channel;
        const auto decode_next = [&]() LOWBIT_INLINE_LAMBDA {
            prefetch_lines(codes, chunk_bytes);
            decode(channel++, decoded.input, kFewInputs, to);
            codes += row_bytes, to += kStride;
        };
        const auto scale = [&](int64_t input) LOWBIT_INLINE_LAMBDA {
            input += chunk.input;
            if constexpr (kScaled > 0)
                add_scaled(memory, blocks(job.rows, kTileRows), decode.scale(chunk.group * kTileChannels, input), input > 0);
        };
        const bool accumulate = !kScaled && chunk.input != 0;
        if (is_whole && steps == kSteps && job.rows <= kTileRows) {
            const int64_t pairs = pairs_at_once(job);
            if (pairs == 4) multiply_and_decode<4, kScaled>(from, x, accumulate, memory, decode_next, scale);
            else if (pairs == 2) multiply_and_decode<2, kScaled>(from, x, accumulate, memory, decode_next, scale);
            else multiply_and_decode<1, kScaled>(from, x, accumulate, memory, decode_next, scale);
        } else {
            constexpr int64_t kTogether = kScaled ? kScaled / kWords : kSteps;
            for (int64_t step = 0; step < steps; step += kTogether) {
                multiply(from + step * kWords, x + step * step_bytes, smaller(kTogether, steps - step), accumulate, memory);
                scale(step * kWords);
            }
            if (is_whole)
                for (int i = 0; i < kTileChannels; ++i, codes += row_bytes, to += kStride) {
                    prefetch_lines(codes, chunk_bytes);
                    decode_inputs(decode, decoded.channel + i, decoded.input, kFewInputs, to);
                }
            else decode_part(job, decoded, asked, kTileChannels, part_decoder<Channel>(job), to);
        }
        if (chunk.group < last && next.input == 0) {
            add_low_rank(job, multiply, chunk.group * kTileChannels, memory.decoded[turn], memory);
            write_sums(job, kScaled ? memory.scaled : memory.sums, chunk.group * kTileChannels);
        }
        chunk = next, next = after;
    }
}

constexpr int64_t channels_of_group(int64_t) { return kTileChannels; }

LOWBIT_END
#endif  // LOWBIT_NATIVE_KERNELS_BFLOAT16_FEW_ROWS_H
