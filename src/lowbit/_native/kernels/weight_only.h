// Products of float32 activations and weights of 8 or 4 bits.
//
// A task is kTaskChannels output channels. Up to kChunk inputs of each are decoded to float32 into the first-level cache
// and multiplied there by all rows, four at a time: memory is read at the size of the codes, and every sum is float32.
// With AVX-512 up to four rows are multiplied by what is decoded in registers: few_rows.h.
// What a code stands for is (code - zero) * scale rounded to float32, as in the references.
#ifndef LOWBIT_NATIVE_KERNELS_WEIGHT_ONLY_H
#define LOWBIT_NATIVE_KERNELS_WEIGHT_ONLY_H

#include "few_rows.h"

LOWBIT_BEGIN(base)

constexpr int kTileRows = 4;  // with kTileChannels channels: 16 sums, 4 weights and an activation in registers

// Ask memory for the codes of a channel that will be wanted after all other channels of the task.
LOWBIT_INLINE void prefetch_codes(const WeightJob& job, int64_t channel, int64_t first, int64_t count, int bits) {
#if defined(__GNUC__) || defined(__clang__)
    const int64_t next =
        first + kChunk < job.depth ? channel * job.depth + first + kChunk : (channel + kTaskChannels) * job.depth;
    const char* codes = static_cast<const char*>(job.weight) + next * bits / 8;
    for (int64_t i = 0; i < count * bits / 8; i += 64) __builtin_prefetch(codes + i);
#endif
}

// Rows [row, row + Rows) by four channels, onto sums [rows][kTaskChannels].
template <int Rows>
LOWBIT_INLINE void add_products(const float* x, int64_t stride, const float* weight, int64_t count, Lanes* sums) {
    Lanes tile[Rows][kTileChannels];
    for (int row = 0; row < Rows; ++row)
        for (int channel = 0; channel < kTileChannels; ++channel) tile[row][channel] = sums[row * kTaskChannels + channel];
    for (int64_t i = 0; i < count; i += kLanes) {
        Lanes weights[kTileChannels];
        for (int channel = 0; channel < kTileChannels; ++channel) weights[channel] = load_lanes(weight + channel * kChunk + i);
        for (int row = 0; row < Rows; ++row) {
            const Lanes activations = load_lanes(x + row * stride + i);
            for (int channel = 0; channel < kTileChannels; ++channel)
                tile[row][channel] = multiply_add(activations, weights[channel], tile[row][channel]);
        }
    }
    for (int row = 0; row < Rows; ++row)
        for (int channel = 0; channel < kTileChannels; ++channel) sums[row * kTaskChannels + channel] = tile[row][channel];
}

LOWBIT_INLINE void add_rows(const WeightJob& job, int64_t first, int64_t count, const float* weight, Lanes* sums) {
    for (int64_t row = 0; row < job.rows; row += kTileRows) {
        const float* x = job.x + row * job.x_stride + first;
        for (int channel = 0; channel < kTaskChannels; channel += kTileChannels) {
            const float* codes = weight + channel * kChunk;
            Lanes* to = sums + row * kTaskChannels + channel;
            switch (job.rows - row) {
                case 1: add_products<1>(x, job.x_stride, codes, count, to); break;
                case 2: add_products<2>(x, job.x_stride, codes, count, to); break;
                case 3: add_products<3>(x, job.x_stride, codes, count, to); break;
                default: add_products<4>(x, job.x_stride, codes, count, to);
            }
        }
    }
}

#ifndef LOWBIT_AVX512
template <typename Code>
LOWBIT_INLINE void decode_to(const WeightJob& job, int64_t channel, int64_t first, int64_t count, float* output, Code) {
    decode_chunk(job, channel, first, count, output, Code{});
}

template <typename Code>
bool multiply_direct(const WeightJob&, int64_t, int64_t) {
    return false;
}

inline void split_activations(WeightJob&) {}
#endif

// Groups [first, last) of kTaskChannels output channels.
template <typename Code>
void multiply_weight(const WeightJob& job, int64_t first, int64_t last) {
    if (multiply_direct<Code>(job, first, last)) return;
    alignas(64) float decoded[kTaskChannels * kChunk];
    Lanes sums[kMostRows * kTaskChannels];
    for (int64_t task = first; task < last; ++task) {
        const int64_t column = task * kTaskChannels, columns = smaller(kTaskChannels, job.columns - column);
        for (int64_t i = 0; i < job.rows * kTaskChannels; ++i) sums[i] = zero_lanes();
        for (int64_t input = 0; input < job.depth; input += kChunk) {
            const int64_t count = smaller(kChunk, job.depth - input), padded = blocks(count, kLanes) * kLanes;
            for (int64_t channel = 0; channel < kTaskChannels; ++channel) {
                float* to = decoded + channel * kChunk;
                const int64_t present = channel < columns ? count : 0;
                prefetch_codes(job, column + channel, input, count, kBits<Code>);
                if (present) decode_to(job, column + channel, input, count, to, Code{});
                for (int64_t i = present; i < padded; ++i) to[i] = 0.0f;
            }
            add_rows(job, input, padded, decoded, sums);
        }
        for (int64_t row = 0; row < job.rows; ++row)
            for (int64_t channel = 0; channel < columns; ++channel)
                write_result(job, row, column + channel, total(sums[row * kTaskChannels + channel]));
    }
}

// Channels [first, last) of an int4 weight, decoded to output [columns, depth] float32 in the order of decode_chunk.
void decode_int4(const WeightJob& job, int64_t first, int64_t last) {
    for (int64_t channel = first; channel < last; ++channel)
        decode_chunk(job, channel, 0, job.depth, static_cast<float*>(job.output) + channel * job.depth, Int4{});
}

LOWBIT_END
#endif  // LOWBIT_NATIVE_KERNELS_WEIGHT_ONLY_H
