// The product of uint8 activations (int8 + 128) and packed int8 weights with AVX512-VNNI, scaled while it is in the cache.
//
// Weights come in panels of 16 output channels: groups of 64 bytes, [channel][4 consecutive inputs], as one VNNI
// instruction reads them. Four panels of up to kDepth inputs stay in the second-level cache while rows pass by, six at a
// time: 24 accumulators, 4 weights and an activation fill the registers. The first of the rows is all ones and gives the
// sum of each channel's weights; 128 times it is what the 128 in the activations has added to every other row.

constexpr int64_t kDepth = 4096;
constexpr int kTileRows = 6;
constexpr int kTilePanels = 4;
constexpr int kTileColumns = kTilePanels * kPanelChannels;

struct Tile {
    const uint8_t* x[kTileRows];  // rows, at the first input of this depth
    const int8_t* weight;         // first panel, first group of this depth
    int64_t panel_stride;         // bytes from panel to panel
    int64_t depth;                // inputs, a multiple of four
    int32_t* sums;                // [rows][64]
    bool accumulate;              // onto the sums of the depth before
};

template <int Rows, int Panels>
void multiply_tile(const Tile& tile) {
    __m512i sums[Rows][Panels];
#pragma GCC unroll 8
    for (int row = 0; row < Rows; ++row)
#pragma GCC unroll 8
        for (int panel = 0; panel < Panels; ++panel)
            sums[row][panel] = tile.accumulate ? _mm512_load_si512(tile.sums + row * kTileColumns + panel * kPanelChannels)
                                               : _mm512_setzero_si512();
    const uint8_t* x[Rows];
#pragma GCC unroll 8
    for (int row = 0; row < Rows; ++row) x[row] = tile.x[row];
    const int8_t* weight = tile.weight;
    for (int64_t i = 0; i < tile.depth; i += 4, weight += 4 * kPanelChannels) {
        __m512i weights[Panels];
#pragma GCC unroll 8
        for (int panel = 0; panel < Panels; ++panel)
            weights[panel] = _mm512_loadu_si512(weight + panel * tile.panel_stride);
#pragma GCC unroll 8
        for (int row = 0; row < Rows; ++row) {
            int32_t four;
            std::memcpy(&four, x[row] + i, sizeof four);
            const __m512i activations = _mm512_set1_epi32(four);
#pragma GCC unroll 8
            for (int panel = 0; panel < Panels; ++panel)
                sums[row][panel] = _mm512_dpbusd_epi32(sums[row][panel], activations, weights[panel]);
        }
    }
#pragma GCC unroll 8
    for (int row = 0; row < Rows; ++row)
#pragma GCC unroll 8
        for (int panel = 0; panel < Panels; ++panel)
            _mm512_store_si512(tile.sums + row * kTileColumns + panel * kPanelChannels, sums[row][panel]);
}

using MultiplyTile = void (*)(const Tile&);

template <int Rows>
constexpr MultiplyTile kTilesOfRows[kTilePanels] = {multiply_tile<Rows, 1>, multiply_tile<Rows, 2>,
                                                    multiply_tile<Rows, 3>, multiply_tile<Rows, 4>};
constexpr const MultiplyTile* kTiles[kTileRows] = {kTilesOfRows<1>, kTilesOfRows<2>, kTilesOfRows<3>,
                                                   kTilesOfRows<4>, kTilesOfRows<5>, kTilesOfRows<6>};

// sums [1 + rows][64], the first of them the weights' own -> rows of the output.
template <typename Output, bool HasBias>
LOWBIT_INLINE void write_rows(const ProductJob& job, const int32_t* sums, int64_t row, int64_t rows, int64_t column,
                              int64_t columns) {
    float values[kTileColumns];
    for (int64_t i = 0; i < rows; ++i) {
        const int32_t* row_sums = sums + (1 + i) * kTileColumns;
        // Unsigned, because what is subtracted may leave int32 before the difference is back in it.
        for (int64_t j = 0; j < columns; ++j)
            values[j] = static_cast<float>(
                static_cast<int32_t>(static_cast<uint32_t>(row_sums[j]) - 128u * static_cast<uint32_t>(sums[j])));
        avx512::scale_row<Output, true, HasBias>(values, columns, job.x_scale[row + i], job.weight_scale + column,
                                                 job.bias + (HasBias ? column : 0),
                                                 static_cast<Output*>(job.output) + (row + i) * job.columns + column);
    }
}

// Tasks [first, last): task t is block t % row_blocks of rows of the group t / row_blocks of four panels.
template <typename Output>
void multiply(const ProductJob& job, int64_t first, int64_t last) {
    alignas(64) int32_t sums[(1 + kLargestRowBlock) * kTileColumns];
    uint8_t ones[kDepth];
    std::memset(ones, 1, sizeof ones);
    const int64_t panel_stride = kPanelChannels * job.depth;
    for (int64_t task = first; task < last; ++task) {
        const int64_t column = task / job.row_blocks * kTileColumns;
        const int64_t columns = smaller(kTileColumns, job.columns - column);
        const int64_t top = task % job.row_blocks * job.row_block;
        const int64_t rows = smaller(job.row_block, job.rows - top);
        for (int64_t depth = 0; depth < job.depth; depth += kDepth) {
            for (int64_t row = 0; row <= rows; row += kTileRows) {
                Tile tile{{},
                          job.weight + column * job.depth + depth * kPanelChannels,
                          panel_stride,
                          smaller(kDepth, job.depth - depth),
                          sums + row * kTileColumns,
                          depth != 0};
                const int64_t count = smaller(kTileRows, 1 + rows - row);
                for (int64_t i = 0; i < count; ++i)
                    tile.x[i] = row + i == 0 ? ones : job.x + (top + row + i - 1) * job.depth + depth;
                kTiles[count - 1][columns / kPanelChannels - 1](tile);
            }
        }
        if (job.bias) write_rows<Output, true>(job, sums, top, rows, column, columns);
        else write_rows<Output, false>(job, sums, top, rows, column, columns);
    }
}

constexpr void (*multiplications[3])(const ProductJob&, int64_t, int64_t) = {multiply<float>, multiply<BFloat16>,
                                                                              multiply<Half>};
