// The product of uint8 activations (int8 + 128) and int8 weights with AVX512-VNNI, scaled while it is in the cache.
//
// Weights are read as they are in a checkpoint, [channel][input], so that a mapped file is multiplied with as it is. For
// more than kMostRowsAlong rows, 64 channels of up to kDepth inputs are rearranged into panels of 16 channels that stay in the
// second-level cache: groups of 64 bytes, [channel][4 consecutive inputs], as one VNNI instruction reads them. Rows pass
// by six at a time (vector_tiles.h). The first of the rows is all ones and gives the sum of each channel's weights; 128
// times it is what the 128 in the activations has added to every other row. A few rows are multiplied along the inputs
// instead, at the speed at which memory gives the weights.
#ifndef LOWBIT_NATIVE_KERNELS_INT8_PRODUCT_H
#define LOWBIT_NATIVE_KERNELS_INT8_PRODUCT_H

#include "transpose.h"
#include "vector_tiles.h"
#include "../runtime.h"

LOWBIT_BEGIN(vnni)

constexpr int64_t kDepth = 4096;

// Panels of `columns` channels of `depth` inputs; `to` holds a multiple of 64 inputs of each. Memory is asked for the panel that
// follows, if only in the next group: of 16 streams at once hardware foresees little.
void pack_panels(const int8_t* from, int64_t stride, int64_t columns, int64_t depth, int8_t* to) {
    for (int64_t column = 0; column < columns; column += kPanelChannels, from += kPanelChannels * stride)
        for (int64_t input = 0; input < depth; input += kStep, to += kPanelChannels * kStep) {
            for (int64_t channel = kPanelChannels; channel < 2 * kPanelChannels; ++channel)
                _mm_prefetch(reinterpret_cast<const char*>(from + channel * stride + input), _MM_HINT_T1);
            pack_step(from + input, stride, present(input, depth), to);
        }
}

// What rows with one channel have after the last 64 inputs. With masked loads for all inputs eight rows would take almost
// twice as long on a Zen 4. Not inlined: there seldom is any.
LOWBIT_NOINLINE int32_t multiply_rest(const uint8_t* x, const int8_t* weight, int64_t first, int64_t depth) {
    int32_t sum = 0;
    for (int64_t i = first; i < depth; ++i) sum += (x ? x[i] : 1) * weight[i];
    return sum;
}

// Sums [Rows][64] of some channels with Rows rows; and the weights' own, if they are wanted. Only then is memory asked for what
// follows: otherwise this has been read before.
template <int Rows, int Channels, bool HasOwn>
void multiply_along(const uint8_t* x, const int8_t* weight, int64_t depth, int32_t* own, int32_t* sums) {
    __m512i totals[Rows + HasOwn][Channels];
#pragma GCC unroll 16
    for (int row = 0; row < Rows + HasOwn; ++row)
#pragma GCC unroll 4
        for (int channel = 0; channel < Channels; ++channel) totals[row][channel] = _mm512_setzero_si512();
    const int64_t whole = depth / kStep * kStep;
    for (int64_t i = 0; i < whole; i += kStep) {
        __m512i weights[Channels];
#pragma GCC unroll 4
        for (int channel = 0; channel < Channels; ++channel) {
            const int8_t* from = weight + channel * depth + i;
            if (HasOwn) _mm_prefetch(reinterpret_cast<const char*>(from) + kBytesAhead, _MM_HINT_T1);
            weights[channel] = _mm512_loadu_si512(from);
        }
#pragma GCC unroll 16
        for (int row = 0; row < Rows + HasOwn; ++row) {
            const __m512i activations = row == Rows ? _mm512_set1_epi8(1) : _mm512_loadu_si512(x + row * depth + i);
#pragma GCC unroll 4
            for (int channel = 0; channel < Channels; ++channel)
                totals[row][channel] = _mm512_dpbusd_epi32(totals[row][channel], activations, weights[channel]);
        }
    }
    const auto rest = [=](const uint8_t* row, const int8_t* from)
                          LOWBIT_INLINE_LAMBDA { return whole == depth ? 0 : multiply_rest(row, from, whole, depth); };
#pragma GCC unroll 4
    for (int channel = 0; channel < Channels; ++channel) {
        const int8_t* from = weight + channel * depth;
        if (HasOwn) own[channel] = _mm512_reduce_add_epi32(totals[Rows + HasOwn - 1][channel]) + rest(nullptr, from);
#pragma GCC unroll 16
        for (int row = 0; row < Rows; ++row)
            sums[row * kVectorColumns + channel] = _mm512_reduce_add_epi32(totals[row][channel]) + rest(x + row * depth, from);
    }
}

using MultiplyAlong = void (*)(const uint8_t*, const int8_t*, int64_t, int32_t*, int32_t*);

// Rows that are multiplied at once, and channels: as many as there are registers for.
struct Along {
    MultiplyAlong multiply;
    int64_t channels;
};

template <int Rows>
constexpr int kChannelsAlong = Rows <= 5 ? 4 : 2;
template <int Rows, bool HasOwn>
constexpr Along kAlongOf = {multiply_along<Rows, kChannelsAlong<Rows>, HasOwn>, kChannelsAlong<Rows>};
template <bool HasOwn>
constexpr Along kAlong[] = {kAlongOf<1, HasOwn>, kAlongOf<2, HasOwn>, kAlongOf<3, HasOwn>, kAlongOf<4, HasOwn>,
                            kAlongOf<5, HasOwn>, kAlongOf<6, HasOwn>, kAlongOf<7, HasOwn>, kAlongOf<8, HasOwn>};
constexpr int64_t kRowsAlong = 8;

// The sums [1 + rows][64] of one group of panels with all rows, of which there are few.
void sum_few_rows(const ProductJob& job, int64_t column, int64_t columns, int32_t* sums) {
    for (int64_t panel = 0; panel < columns; panel += kPanelChannels)
        for (int64_t row = 0; row < job.rows; row += kRowsAlong) {
            const int64_t rows = smaller(kRowsAlong, job.rows - row);
            const Along& along = row == 0 ? kAlong<true>[rows - 1] : kAlong<false>[rows - 1];
            for (int64_t channel = panel; channel < panel + kPanelChannels; channel += along.channels)
                along.multiply(job.x + row * job.depth, job.weight + (column + channel) * job.depth, job.depth, sums + channel,
                               sums + (1 + row) * kVectorColumns + channel);
        }
}

struct Dot8 {
    static __m512i multiply(__m512i sums, __m512i x, __m512i weights) { return _mm512_dpbusd_epi32(sums, x, weights); }
};

struct Dot16 {
    static __m512i multiply(__m512i sums, __m512i x, __m512i weights) { return _mm512_dpwssd_epi32(sums, x, weights); }
};

// Sums [rows][64] of a group of panels, and the weights' own [64] -> rows of the output.
template <typename Output, bool HasBias>
LOWBIT_INLINE void write_rows(const ProductJob& job, const int32_t* own, const int32_t* sums, int64_t row, int64_t rows,
                              int64_t column, int64_t columns) {
    for (int64_t panel = 0; panel < columns; panel += kPanelChannels) {
        const __m512i added = _mm512_slli_epi32(_mm512_load_si512(own + panel), 7);
        const __m512 scale = _mm512_loadu_ps(job.weight_scale + column + panel);
        const __m512 bias = HasBias ? _mm512_loadu_ps(job.bias + column + panel) : _mm512_setzero_ps();
        Output* to = static_cast<Output*>(job.output) + row * job.columns + column + panel;
        for (int64_t i = 0; i < rows; ++i, to += job.columns) {
            // Wraps, because what is subtracted may leave int32 before the difference is back in it.
            const __m512i sum = _mm512_sub_epi32(_mm512_load_si512(sums + i * kVectorColumns + panel), added);
            const __m512 value =
                _mm512_mul_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(sum), _mm512_set1_ps(job.x_scale[row + i])), scale);
            store_narrow(to, 0xffff, HasBias ? _mm512_add_ps(value, bias) : value);
        }
    }
}

// The panels a thread packed last: the tasks it takes one after the other mostly multiply the same ones. And what it sums.
struct Packed {
    alignas(64) int8_t panels[kVectorColumns * kDepth];
    alignas(64) int32_t sums[(1 + kLargestRowBlock) * kVectorColumns];
    int64_t call, column, depth;  // whose they are; calls count from 1
};

// Rows from `top` on with one group of panels.
template <typename Output, bool HasBias>
LOWBIT_INLINE void multiply_group(const ProductJob& job, int64_t top, int64_t rows, int64_t column, int64_t columns,
                                  const uint8_t* ones, Packed& packed) {
    int32_t* sums = packed.sums;
    for (int64_t depth = 0; depth < job.depth; depth += kDepth) {
        const int64_t inputs = smaller(kDepth, job.depth - depth);
        if (packed.call != job.call || packed.column != column || packed.depth != depth) {
            pack_panels(job.weight + column * job.depth + depth, job.depth, columns, inputs, packed.panels);
            packed.call = job.call, packed.column = column, packed.depth = depth;
        }
        for (int64_t row = 0; row <= rows; row += kVectorRows) {
            Tile tile{
                {},        packed.panels, kPanelChannels * kStep * blocks(inputs, kStep), inputs, sums + row * kVectorColumns,
                depth != 0};
            const int64_t count = smaller(kVectorRows, 1 + rows - row);
            for (int64_t i = 0; i < count; ++i) tile.x[i] = row + i == 0 ? ones : job.x + (top + row + i - 1) * job.depth + depth;
            kTiles<Dot8>[count - 1][columns / kPanelChannels - 1](tile);
            if (depth + inputs < job.depth) continue;
            const int64_t first = row == 0 ? 1 : row;  // behind the row of ones
            write_rows<Output, HasBias>(job, sums, sums + first * kVectorColumns, top + first - 1, row + count - first, column,
                                        columns);
        }
    }
}

// Tasks [first, last): task t is block t % row_blocks of rows of the group t / row_blocks of four panels.
template <typename Output, bool HasBias>
LOWBIT_INLINE void multiply_tasks(const ProductJob& job, int64_t first, int64_t last) {
    uint8_t ones[kDepth];
    std::memset(ones, 1, sizeof ones);
    auto& packed = scratch_object<Packed>(Slot::kInt8Panels);
    for (int64_t task = first; task < last; ++task) {
        const int64_t column = task / job.row_blocks * kVectorColumns;
        const int64_t columns = smaller(kVectorColumns, job.columns - column);
        const int64_t top = task % job.row_blocks * job.row_block;
        const int64_t rows = smaller(job.row_block, job.rows - top);
        if (job.rows > kMostRowsAlong) {
            multiply_group<Output, HasBias>(job, top, rows, column, columns, ones, packed);
            continue;
        }
        int32_t* sums = packed.sums;
        sum_few_rows(job, column, columns, sums);
        write_rows<Output, HasBias>(job, sums, sums + kVectorColumns, top, rows, column, columns);
    }
}

template <typename Output>
void multiply(const ProductJob& job, int64_t first, int64_t last) {
    if (job.bias) multiply_tasks<Output, true>(job, first, last);
    else multiply_tasks<Output, false>(job, first, last);
}

constexpr void (*multiplications[3])(const ProductJob&, int64_t, int64_t) = {multiply<float>, multiply<BFloat16>, multiply<Half>};

LOWBIT_END
#endif  // LOWBIT_NATIVE_KERNELS_INT8_PRODUCT_H
