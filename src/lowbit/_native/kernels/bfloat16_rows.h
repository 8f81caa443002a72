// What products of bfloat16 with weights that are decoded to it have in common, by AMX (amx_few_rows.h, amx_product.h) and by
// AVX512-BF16 (bfloat16_few_rows.h, bfloat16_product.h).
//
// For few rows decoded inputs are used as they lie in the weight, and the activations are transposed, in pairs of inputs. The
// sums are transposed, too, and are written transposed back. For more rows decoded inputs are rearranged into panels.
#ifndef LOWBIT_NATIVE_KERNELS_BFLOAT16_ROWS_H
#define LOWBIT_NATIVE_KERNELS_BFLOAT16_ROWS_H

#include <type_traits>

#include "transpose.h"
#include "weight_codes.h"

LOWBIT_BEGIN(gemm)

using base::E2M1;
using base::Int4;
using base::narrow;
using base::store_narrow;
using base::widen;
using vnni::kBytesAhead;
using vnni::kStep;
using vnni::lane_numbers;
using vnni::pack_step;
using vnni::present;

constexpr int64_t kWords = 32;  // bfloat16 in a register
constexpr int64_t kMostDecoded = 2048;
constexpr int64_t kFewInputs = 256;
constexpr int64_t kStride = kFewInputs + kWords;  // of decoded channels: 512 bytes apart they would share few sets
constexpr int64_t kChannelBytes = kStride * sizeof(BFloat16);
constexpr int64_t kTileRows = 16;
constexpr int64_t kTileChannels = 16;
constexpr int64_t kTileBytes = 1024;

LOWBIT_INLINE __mmask16 column_mask(int64_t columns) {
    return columns >= 16 ? 0xffff : static_cast<__mmask16>((1u << (columns < 0 ? 0 : columns)) - 1);
}

// Inputs in the order in which a decoder writes those of a weight.
LOWBIT_INLINE __m512i reorder(const BFloat16Decoder* decoder, __m512i inputs) {
    return decoder && decoder->order ? _mm512_permutexvar_epi16(_mm512_load_si512(decoder->order), inputs) : inputs;
}

// Without AMX into the second-level cache: a Zen 4 has more requests under way so, a Xeon with AMX gained nothing by it.
#ifdef LOWBIT_TILES
#define LOWBIT_PREFETCH "prefetcht0"
#else
#define LOWBIT_PREFETCH "prefetcht1"
#endif

// Ask memory for what is decoded soon: the hardware's own prefetching ends with a page.
LOWBIT_INLINE void prefetch_lines(const char* from, int64_t bytes) {
    const char* end = from + bytes;
    for (from -= reinterpret_cast<uintptr_t>(from) % 64; from < end; from += 64)
        __asm__ volatile(LOWBIT_PREFETCH " %0" : : "m"(*from));  // the builtin is left out where nothing else is inlined with it
}
#undef LOWBIT_PREFETCH

LOWBIT_INLINE int64_t bytes_of(const BFloat16Decoder& decoder, int64_t inputs) { return inputs * decoder.bytes_of_256 / 256; }

LOWBIT_INLINE const char* codes_at(const BFloat16Decoder& decoder, int64_t channel, int64_t first) {
    return static_cast<const char*>(decoder.codes) + channel * decoder.row_bytes + bytes_of(decoder, first);
}

// 16 channels, `channels` of them, of `bytes` bytes of inputs -> a panel.
LOWBIT_INLINE void pack_panel(const int8_t* from, int64_t stride, int64_t channels, int64_t bytes, uint8_t* to) {
    for (int64_t at = 0; at < bytes; at += kStep, to += kTileBytes) {
        const __mmask64 mask = present(at, bytes);
        if (channels == kPanelChannels) {
            pack_step(from + at, stride, mask, reinterpret_cast<int8_t*>(to));
            continue;
        }
        alignas(64) int8_t rows[kPanelChannels * kStep] = {};
        for (int64_t channel = 0; channel < channels; ++channel)
            _mm512_store_si512(rows + channel * kStep, _mm512_maskz_loadu_epi8(mask, from + channel * stride + at));
        pack_step(rows, kStep, ~__mmask64{0}, reinterpret_cast<int8_t*>(to));
    }
}

// Channels of a panel one after the other, not 4096 bytes apart: those would share a set of the cache.
struct Decoded {
    alignas(64) int8_t channels[kPanelChannels][kMostDecoded * sizeof(BFloat16) + kStep];
};

// A panel of `bytes` bytes of bfloat16, of at most kMostDecoded, from byte `first` on, of the channels from `channel` on.
LOWBIT_INLINE void pack_decoded(const GemmArgs& job, const void* weight, int64_t channel, int64_t first, int64_t bytes,
                                Decoded& decoded, uint8_t* to) {
    const int64_t channels = smaller(kPanelChannels, job.columns - channel);
    for (int64_t i = 0; i < channels; ++i) {
        prefetch_lines(codes_at(*job.decoder, channel + i + 1, first / 2), bytes_of(*job.decoder, bytes / 2));
        job.decoder->decode(weight, channel + i, first / 2, bytes / 2, reinterpret_cast<BFloat16*>(decoded.channels[i]));
    }
    pack_panel(decoded.channels[0], sizeof decoded.channels[0], channels, bytes, to);
}

// A step of 32 inputs of up to 16 rows from `row` on -> [16 pairs of inputs][16 rows][2], zero beyond the last row and input.
LOWBIT_INLINE void turn_step(const GemmArgs& job, int64_t step, int64_t row, int8_t* turned) {
    const __mmask64 mask = present(step * kStep, job.depth);
    const auto* from = static_cast<const int8_t*>(job.input) + row * job.stride + step * kStep;
    alignas(64) int8_t rows[kTileRows * kStep] = {};
    for (int64_t i = 0; i < smaller(kTileRows, job.rows - row); ++i, from += job.stride)
        _mm512_store_si512(rows + i * kStep, reorder(job.decoder, _mm512_maskz_loadu_epi8(mask, from)));
    pack_step(rows, kStep, ~__mmask64{0}, turned);
}

// Sums [16 channels][16 rows] -> output [rows][channels].
LOWBIT_INLINE void write_transposed(const GemmArgs& job, const float* sums, int64_t row, int64_t column) {
    alignas(64) float turned[kTileRows * kTileChannels];
    pack_step(reinterpret_cast<const int8_t*>(sums), kStep, ~__mmask64{0}, reinterpret_cast<int8_t*>(turned));
    const __mmask16 mask = column_mask(job.columns - column);
    const __m512 scale =
        job.weight.column_scale ? _mm512_maskz_loadu_ps(mask, job.weight.column_scale + column) : _mm512_set1_ps(1.0f);
    const __m512 bias = job.weight.bias ? _mm512_maskz_loadu_ps(mask, job.weight.bias + column) : _mm512_setzero_ps();
    auto* to = static_cast<BFloat16*>(job.output) + row * job.columns + column;
    for (int64_t i = 0; i < smaller(kTileRows, job.rows - row); ++i, to += job.columns) {
        const __m512 value = _mm512_mul_ps(_mm512_load_ps(turned + i * kTileChannels), scale);
        store_narrow(to, mask, job.weight.bias ? _mm512_add_ps(value, bias) : value);
    }
}

// Inputs of the channel of the low-rank product's second half that begin with a step, zero beyond the last.
LOWBIT_INLINE __m512i low_rank_inputs(const GemmArgs& job, int64_t channel, int64_t step) {
    const __mmask64 mask = present(step * kStep, 2 * job.low_rank.rank);
    const BFloat16* from = job.low_rank.up + channel * job.low_rank.rank + step * kWords;
    return channel < job.columns ? _mm512_maskz_loadu_epi8(mask, from) : _mm512_setzero_si512();
}

// Writes inputs of one channel. Not inlined: what products of few rows do while they multiply has it inlined.
template <typename Channel>
LOWBIT_NOINLINE void decode_inputs(const Channel& decode, int64_t channel, int64_t first, int64_t count, BFloat16* output) {
    decode(channel, first, count, output);
}

template <typename Channel>
void decode_channel(const void* weight, int64_t channel, int64_t first, int64_t count, BFloat16* output) {
    decode_inputs(Channel{weight}, channel, first, count, output);
}

// Any decoder by its address: for those that take so long that a call does not count, so that products are compiled once for all.
struct AnyChannel {
    static constexpr int64_t kScaledInputs = 0;
    decltype(BFloat16Decoder::decode) decode;
    const void* weight;

    void operator()(int64_t channel, int64_t first, int64_t count, BFloat16* output) const {
        decode(weight, channel, first, count, output);
    }
};

// What decodes the inputs of a product's channels.
template <typename Channel>
LOWBIT_INLINE Channel channel_of(const GemmArgs& job) {
    if constexpr (std::is_same<Channel, AnyChannel>::value) return {job.decoder->decode, job.weight.data};
    else return Channel(job.weight.data);
}

// Inputs of a group of channels; none of group `last`, where a task ends.
struct Chunk {
    int64_t group, input;
};

LOWBIT_INLINE Chunk next_chunk(const GemmArgs& job, const Chunk& chunk, int64_t last) {
    if (chunk.group < last && chunk.input + kFewInputs < job.depth / 2) return {chunk.group, chunk.input + kFewInputs};
    return {smaller(chunk.group + 1, last), 0};
}

// Some channels of a chunk: what is decoded, or asked of memory, between two steps.
struct Part {
    int64_t channel, last, input, inputs;

    bool is_whole(int64_t channels) const { return last - channel == channels && inputs == kFewInputs; }
};

LOWBIT_INLINE Part part_of(const GemmArgs& job, const Chunk& chunk, int64_t last, int64_t channels) {
    const int64_t channel = chunk.group * channels, end = chunk.group < last ? smaller(channel + channels, job.columns) : channel;
    return {channel, end, chunk.input, smaller(kFewInputs, job.depth / 2 - chunk.input)};
}

using DecodeChannel = decltype(BFloat16Decoder::decode);

// What decodes a part of a product's channels: of blocks whose scales are left to the sums another than the decoder's own.
template <typename Channel>
LOWBIT_INLINE DecodeChannel part_decoder(const GemmArgs& job) {
    if constexpr (std::is_same<Channel, AnyChannel>::value) return job.decoder->decode;
    else return decode_channel<Channel>;
}

// At most `channels` of each.
LOWBIT_NOINLINE void decode_part(const GemmArgs& job, const Part& decoded, const Part& asked, int64_t channels,
                                 DecodeChannel decode, BFloat16* output) {
    for (int64_t channel = asked.channel; channel < smaller(asked.channel + channels, asked.last); ++channel)
        prefetch_lines(codes_at(*job.decoder, channel, asked.input), bytes_of(*job.decoder, asked.inputs));
    for (int64_t channel = decoded.channel; channel < smaller(decoded.channel + channels, decoded.last); ++channel) {
        decode(job.weight.data, channel, decoded.input, decoded.inputs, output);
        for (int64_t rest = decoded.inputs; rest % kWords; ++rest) output[rest].bits = 0;
        output += kStride;
    }
}

constexpr int64_t kSteps = kFewInputs / kWords;

LOWBIT_END
#endif  // LOWBIT_NATIVE_KERNELS_BFLOAT16_ROWS_H
