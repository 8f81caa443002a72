// Decoding rows of GGUF blocks, and products with few rows.
#ifndef LOWBIT_NATIVE_KERNELS_GGUF_H
#define LOWBIT_NATIVE_KERNELS_GGUF_H

#include "gguf_blocks.h"
#include "../runtime.h"

LOWBIT_BEGIN(base)

#ifdef LOWBIT_AVX512
template <typename Block>
LOWBIT_INLINE void decode_block(const uint8_t* block, float* out) {
    if constexpr (Block::elements == 1) Block::decode(block, out);
    else Block::unpack(block, [=](int i, __m512 values) LOWBIT_INLINE_LAMBDA { _mm512_storeu_ps(out + i, values); });
}
#else
template <typename Block>
LOWBIT_INLINE void decode_block(const uint8_t* block, float* out) {
    Block::decode(block, out);
}
#endif

// Elements [0, count) of a row, count a multiple of the block.
template <typename Block>
LOWBIT_INLINE void decode_row(const uint8_t* input, int64_t count, float* output) {
    for (int64_t i = 0; i < count; i += Block::elements, input += Block::bytes) decode_block<Block>(input, output + i);
}

// Not inlined: the same for every block type.
template <typename Output>
LOWBIT_NOINLINE void narrow_all(const float* values, int64_t count, Output* output) {
    for (int64_t i = 0; i < count; ++i) narrow(values[i], output[i]);
}

// Rows [first, last).
template <typename Block>
void decode_blocks(const GgufJob& job, int64_t first, int64_t last) {
    constexpr int64_t kPiece = 1024;
    float values[kPiece];
    const int64_t row_bytes = job.columns / Block::elements * Block::bytes;
    const int64_t piece = job.element_type == kFloat32 ? job.columns : kPiece;
    for (int64_t row = first; row < last; ++row) {
        for (int64_t column = 0; column < job.columns; column += piece) {
            const int64_t count = smaller(piece, job.columns - column), at = row * job.columns + column;
            float* to = job.element_type == kFloat32 ? static_cast<float*>(job.output) + at : values;
            decode_row<Block>(job.input + row * row_bytes + column / Block::elements * Block::bytes, count, to);
            if (job.element_type == kBFloat16) narrow_all(values, count, static_cast<BFloat16*>(job.output) + at);
            else if (job.element_type == kFloat16) narrow_all(values, count, static_cast<Half*>(job.output) + at);
        }
    }
}

#ifdef LOWBIT_AVX512
constexpr int kGgufRows = 4;      // output channels of a task: decoded side by side
constexpr int kGgufTile = 6;      // rows of x multiplied at once: 24 accumulators, 4 weights and a value of x
constexpr int kGgufDepth = 2048;  // decoded at once: 32 KiB stay in the first-level cache

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
        for (int channel = 0; channel < kGgufRows; ++channel) sums[row][channel] += _mm512_reduce_add_ps(totals[row][channel]);
}

using MultiplyRows = void (*)(const float (*)[kGgufDepth], const float*, int64_t, int64_t, float (*)[kGgufRows]);

template <int Rows>
void multiply_gguf_rows(const float (*weight)[kGgufDepth], const float* x, int64_t stride, int64_t depth,
                        float (*sums)[kGgufRows]) {
    multiply_rows<Rows>(weight, x, stride, depth, sums);
}

constexpr MultiplyRows kMultiplyRows[kGgufTile] = {multiply_gguf_rows<1>, multiply_gguf_rows<2>, multiply_gguf_rows<3>,
                                                   multiply_gguf_rows<4>, multiply_gguf_rows<5>, multiply_gguf_rows<6>};

constexpr int kGgufDirectRows = 4;  // up to which weights stay in registers: to store and load them takes longer than to decode

// Not inlined: the same for every block type.
LOWBIT_NOINLINE void write_sum(const GgufProductJob& job, int64_t row, int64_t channel, float sum) {
    const float value = job.bias ? sum + job.bias[channel] : sum;
    const int64_t at = row * job.features + channel;
    if (job.element_type == kFloat32) narrow(value, static_cast<float*>(job.output)[at]);
    else if (job.element_type == kBFloat16) narrow(value, static_cast<BFloat16*>(job.output)[at]);
    else narrow(value, static_cast<Half*>(job.output)[at]);
}

// Some output channels of a few rows, decoded in registers; added to sums [channels]. Inputs are taken in pieces of which x
// stays in the first-level cache.
template <typename Block, int Rows>
void multiply_unpacked(const GgufProductJob& job, const uint8_t* weight, int64_t channels, float (*sums)[kGgufDirectRows]) {
    constexpr int kDepth = 8192 / Rows / 256 * 256;
    constexpr int kTotals = Block::elements == 32 ? 2 : 4;  // chains of additions that don't wait for each other
    const int64_t row_bytes = job.columns / Block::elements * Block::bytes;
    for (int64_t start = 0; start < job.columns; start += kDepth) {
        const int64_t end = smaller(start + kDepth, job.columns);
        for (int64_t channel = 0; channel < channels; ++channel) {
            const uint8_t* block = weight + channel * row_bytes + start / Block::elements * Block::bytes;
            __m512 totals[Rows][kTotals] = {};
            for (int64_t first = start; first < end; first += Block::elements, block += Block::bytes) {
                // The next channel's: the hardware's own prefetching ends with a page.
                for (int i = 0; i < Block::bytes; i += 64)
                    _mm_prefetch(reinterpret_cast<const char*>(block) + row_bytes + i, _MM_HINT_T0);
                const float* x = job.x + first;
                Block::unpack(block, [&](int i, __m512 weights) LOWBIT_INLINE_LAMBDA {
#pragma GCC unroll 8
                    for (int row = 0; row < Rows; ++row) {
                        __m512& total = totals[row][i / 16 % kTotals];
                        total = _mm512_fmadd_ps(_mm512_loadu_ps(x + row * job.columns + i), weights, total);
                    }
                });
            }
#pragma GCC unroll 8
            for (int row = 0; row < Rows; ++row) {
#pragma GCC unroll 8
                for (int i = 1; i < kTotals; ++i) totals[row][0] = _mm512_add_ps(totals[row][0], totals[row][i]);
                sums[channel][row] += _mm512_reduce_add_ps(totals[row][0]);
            }
        }
    }
}

// Output channels [first, last).
template <typename Block>
void multiply_directly(const GgufProductJob& job, int64_t first, int64_t last) {
    using Multiply = void (*)(const GgufProductJob&, const uint8_t*, int64_t, float (*)[kGgufDirectRows]);
    constexpr Multiply kMultiply[kGgufDirectRows] = {multiply_unpacked<Block, 1>, multiply_unpacked<Block, 2>,
                                                     multiply_unpacked<Block, 3>, multiply_unpacked<Block, 4>};
    constexpr int kChannels = 32;  // that share a piece of x
    const int64_t row_bytes = job.columns / Block::elements * Block::bytes;
    for (int64_t channel = first; channel < last; channel += kChannels) {
        float sums[kChannels][kGgufDirectRows] = {};
        const int64_t channels = smaller(kChannels, last - channel);
        kMultiply[job.rows - 1](job, job.input + channel * row_bytes, channels, sums);
        for (int64_t row = 0; row < job.rows; ++row)
            for (int64_t i = 0; i < channels; ++i) write_sum(job, row, channel + i, sums[i][row]);
    }
}

// Tasks [first, last) of four output channels. columns % 32 == 0.
template <typename Block>
void multiply_blocks(const GgufProductJob& job, int64_t first, int64_t last) {
    if constexpr (Block::elements > 1)
        if (job.rows <= kGgufDirectRows)
            return multiply_directly<Block>(job, first * kGgufRows, smaller(last * kGgufRows, job.features));
    alignas(64) float weight[kGgufRows][kGgufDepth];
    auto* const sums = scratch<float[kGgufRows]>(Slot::kGgufSums, job.rows);
    const int64_t row_bytes = job.columns / Block::elements * Block::bytes;
    for (int64_t task = first; task < last; ++task) {
        const int64_t channel = task * kGgufRows;
        const int64_t channels = smaller(kGgufRows, job.features - channel);
        std::memset(sums, 0, static_cast<size_t>(job.rows) * sizeof *sums);
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
            for (int64_t i = 0; i < channels; ++i) write_sum(job, row, channel + i, sums[row][i]);
    }
}
#endif

template <typename Block>
constexpr GgufKernels gguf_entry(int number) {
#ifdef LOWBIT_AVX512
    return {number, Block::elements, Block::bytes, decode_blocks<Block>, multiply_blocks<Block>};
#else
    return {number, Block::elements, Block::bytes, decode_blocks<Block>, nullptr};
#endif
}

// By ggml's number of the type.
constexpr GgufKernels gguf_kernels[] = {
    gguf_entry<PlainF32>(0),   gguf_entry<PlainF16>(1),     gguf_entry<PlainBF16>(30),   gguf_entry<BlockQ8_0>(8),
    gguf_entry<BlockQ4_0>(2),  gguf_entry<BlockQ4_1>(3),    gguf_entry<BlockQ5_0>(6),    gguf_entry<BlockQ5_1>(7),
    gguf_entry<BlockQ2_K>(10), gguf_entry<BlockQ3_K>(11),   gguf_entry<BlockQ4_K>(12),   gguf_entry<BlockQ5_K>(13),
    gguf_entry<BlockQ6_K>(14), gguf_entry<BlockIQ4_NL>(20), gguf_entry<BlockIQ4_XS>(23),
};
constexpr int kGgufTypes = sizeof gguf_kernels / sizeof gguf_kernels[0];

LOWBIT_END
#endif  // LOWBIT_NATIVE_KERNELS_GGUF_H
