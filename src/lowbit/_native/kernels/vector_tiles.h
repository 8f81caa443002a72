// The inner loop of products by vectors: up to six rows times up to four panels of 16 channels, whose 24 sums, four weights
// and an activation fill the registers.
#ifndef LOWBIT_NATIVE_KERNELS_VECTOR_TILES_H
#define LOWBIT_NATIVE_KERNELS_VECTOR_TILES_H

#include "../target.h"

LOWBIT_BEGIN(vnni)

constexpr int kVectorRows = 6;
constexpr int kVectorPanels = 4;
constexpr int kVectorColumns = kVectorPanels * kPanelChannels;

// `Dot` multiplies 32 bits of a row with 32 bits of each of 16 channels and adds them to their sums.
struct Tile {
    const uint8_t* x[kVectorRows];  // rows, at the first input of this depth
    const int8_t* weight;           // first panel, first group of this depth
    int64_t panel_stride;           // bytes from panel to panel
    int64_t depth;                  // bytes of inputs, a multiple of four
    int32_t* sums;                  // [rows][64]; where they are float32, their bits
    bool accumulate;                // onto the sums of the depth before
};

template <typename Dot, int Rows, int Panels>
void multiply_tile(const Tile& tile) {
    __m512i sums[Rows][Panels];
#pragma GCC unroll 8
    for (int row = 0; row < Rows; ++row)
#pragma GCC unroll 8
        for (int panel = 0; panel < Panels; ++panel)
            sums[row][panel] = tile.accumulate ? _mm512_load_si512(tile.sums + row * kVectorColumns + panel * kPanelChannels)
                                               : _mm512_setzero_si512();
    const uint8_t* x[Rows];
#pragma GCC unroll 8
    for (int row = 0; row < Rows; ++row) x[row] = tile.x[row];
    const int8_t* weight = tile.weight;
    for (int64_t i = 0; i < tile.depth; i += 4, weight += 4 * kPanelChannels) {
        __m512i weights[Panels];
#pragma GCC unroll 8
        for (int panel = 0; panel < Panels; ++panel) weights[panel] = _mm512_loadu_si512(weight + panel * tile.panel_stride);
#pragma GCC unroll 8
        for (int row = 0; row < Rows; ++row) {
            int32_t four;
            std::memcpy(&four, x[row] + i, sizeof four);
            const __m512i activations = _mm512_set1_epi32(four);
#pragma GCC unroll 8
            for (int panel = 0; panel < Panels; ++panel)
                sums[row][panel] = Dot::multiply(sums[row][panel], activations, weights[panel]);
        }
    }
#pragma GCC unroll 8
    for (int row = 0; row < Rows; ++row)
#pragma GCC unroll 8
        for (int panel = 0; panel < Panels; ++panel)
            _mm512_store_si512(tile.sums + row * kVectorColumns + panel * kPanelChannels, sums[row][panel]);
}

using MultiplyTile = void (*)(const Tile&);

template <typename Dot, int Rows>
constexpr MultiplyTile kTilesOfRows[kVectorPanels] = {multiply_tile<Dot, Rows, 1>, multiply_tile<Dot, Rows, 2>,
                                                      multiply_tile<Dot, Rows, 3>, multiply_tile<Dot, Rows, 4>};
template <typename Dot>
constexpr const MultiplyTile* kTiles[kVectorRows] = {kTilesOfRows<Dot, 1>, kTilesOfRows<Dot, 2>, kTilesOfRows<Dot, 3>,
                                                     kTilesOfRows<Dot, 4>, kTilesOfRows<Dot, 5>, kTilesOfRows<Dot, 6>};

LOWBIT_END
#endif  // LOWBIT_NATIVE_KERNELS_VECTOR_TILES_H
