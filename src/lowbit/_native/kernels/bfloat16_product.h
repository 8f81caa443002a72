// Products of many rows of bfloat16 with weights that are decoded to it, by AVX512-BF16.
//
// 64 channels of up to kMostDecoded inputs are decoded and rearranged into panels, which stay in the second-level cache while all
// rows pass by, six at a time (vector_tiles.h). Rows are brought to the order of the decoded inputs first, where it is another.
#ifndef LOWBIT_NATIVE_KERNELS_BFLOAT16_PRODUCT_H
#define LOWBIT_NATIVE_KERNELS_BFLOAT16_PRODUCT_H

#include "bfloat16_rows.h"
#include "vector_tiles.h"
#include "../runtime.h"

LOWBIT_BEGIN(gemm)

using vnni::kTiles;
using vnni::kVectorColumns;
using vnni::kVectorRows;
using vnni::Tile;

constexpr int64_t kPanelBytes = kMostDecoded * sizeof(BFloat16);  // of each channel

struct DotBFloat16 {
    static __m512i multiply(__m512i sums, __m512i x, __m512i weights) {
        return _mm512_castps_si512(_mm512_dpbf16_ps(_mm512_castsi512_ps(sums), reinterpret_cast<const __m512bh&>(x),
                                                    reinterpret_cast<const __m512bh&>(weights)));
    }
};

int64_t step_bytes_of(const GemmArgs& job) { return blocks(job.depth, kStep) * kStep; }

// Whether rows are multiplied where they lie.
bool are_arranged(const GemmArgs& job) { return !job.decoder->order && job.depth % kStep == 0; }

// Rows [first, last) -> job.tiles [rows][whole steps of 64 bytes], zero beyond the last input.
void arrange_rows(const GemmArgs& job, int64_t first, int64_t last) {
    const int64_t bytes = step_bytes_of(job);
    for (int64_t row = first; row < last; ++row) {
        const auto* from = static_cast<const uint8_t*>(job.input) + row * job.stride;
        uint8_t* to = job.tiles + row * bytes;
        for (int64_t i = 0; i < bytes; i += kStep)
            _mm512_store_si512(to + i, reorder(job.decoder, _mm512_maskz_loadu_epi8(present(i, job.depth), from + i)));
    }
}

// What a thread packed last, and the sums it works on.
struct BFloat16Panels {
    alignas(64) uint8_t panels[kVectorColumns * kPanelBytes];
    alignas(64) int32_t sums[kMostVectorRows * kVectorColumns];  // bits of float32
    Decoded decoded;
    int64_t call = 0, column, depth;
};

// The sums of `rows` rows from `top` on with the channels of a group.
void sum_rows(const GemmArgs& job, int64_t top, int64_t rows, int64_t column, int64_t columns, BFloat16Panels& packed) {
    const int64_t step_bytes = step_bytes_of(job), panels = blocks(columns, kPanelChannels);
    const auto* x = are_arranged(job) ? static_cast<const uint8_t*>(job.input) : job.tiles;
    const int64_t stride = are_arranged(job) ? job.stride : step_bytes;
    for (int64_t depth = 0; depth < step_bytes; depth += kPanelBytes) {
        const int64_t bytes = smaller(kPanelBytes, step_bytes - depth), panel_bytes = bytes * kPanelChannels;
        if (packed.call != job.call || packed.column != column || packed.depth != depth) {
            for (int64_t panel = 0; panel < panels; ++panel)
                pack_decoded(job, job.weight.data, column + panel * kPanelChannels, depth,
                             smaller(kPanelBytes, job.depth - depth), packed.decoded, packed.panels + panel * panel_bytes);
            packed.call = job.call, packed.column = column, packed.depth = depth;
        }
        for (int64_t row = 0; row < rows; row += kVectorRows) {
            Tile tile{
                {},        reinterpret_cast<const int8_t*>(packed.panels), panel_bytes, bytes, packed.sums + row * kVectorColumns,
                depth != 0};
            const int64_t count = smaller(kVectorRows, rows - row);
            for (int64_t i = 0; i < count; ++i) tile.x[i] = x + (top + row + i) * stride + depth;
            kTiles<DotBFloat16>[count - 1][panels - 1](tile);
        }
    }
}

void write_rows(const GemmArgs& job, const int32_t* sums, int64_t top, int64_t rows, int64_t column, int64_t columns) {
    for (int64_t panel = 0; panel < columns; panel += kPanelChannels) {
        const int64_t channel = column + panel;
        const __mmask16 mask = column_mask(columns - panel);
        const __m512 scale =
            job.weight.column_scale ? _mm512_maskz_loadu_ps(mask, job.weight.column_scale + channel) : _mm512_set1_ps(1.0f);
        const __m512 bias = job.weight.bias ? _mm512_maskz_loadu_ps(mask, job.weight.bias + channel) : _mm512_setzero_ps();
        auto* to = static_cast<BFloat16*>(job.output) + top * job.columns + channel;
        for (int64_t row = 0; row < rows; ++row, to += job.columns) {
            const __m512i bits = _mm512_load_si512(sums + row * kVectorColumns + panel);
            const __m512 value = _mm512_mul_ps(_mm512_castsi512_ps(bits), scale);
            store_narrow(to, mask, job.weight.bias ? _mm512_add_ps(value, bias) : value);
        }
    }
}

// Tasks [first, last): task t is block t % row_blocks of rows of the group t / row_blocks of 64 channels.
void multiply_many_rows(const GemmArgs& job, int64_t first, int64_t last) {
    auto& packed = scratch_object<BFloat16Panels>(Slot::kBFloat16Panels);
    for (int64_t task = first; task < last; ++task) {
        const int64_t column = task / job.row_blocks * kVectorColumns, columns = smaller(kVectorColumns, job.columns - column);
        const int64_t top = task % job.row_blocks * job.row_block, rows = smaller(job.row_block, job.rows - top);
        sum_rows(job, top, rows, column, columns, packed);
        write_rows(job, packed.sums, top, rows, column, columns);
    }
}

LOWBIT_END
#endif  // LOWBIT_NATIVE_KERNELS_BFLOAT16_PRODUCT_H
