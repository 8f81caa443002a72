// AMX as loops over tiles of 16 rows of 64 bytes; see simd512.h. What the instructions refuse ends the process: tiles that
// are not configured, shapes that do not match.
#ifndef LOWBIT_NATIVE_EMULATION_TILES_H
#define LOWBIT_NATIVE_EMULATION_TILES_H

#include "simd512.h"

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")

namespace lowbit {
namespace emulation {

constexpr int kTiles = 8;

struct TileState {
    bool is_configured = false;
    int rows[kTiles] = {}, row_bytes[kTiles] = {};
    alignas(64) uint8_t data[kTiles][16][64] = {};
};

inline TileState& tiles() {
    static thread_local TileState state;
    return state;
}

inline void require(bool condition) {
    if (!condition) __builtin_trap();
}

LOWBIT_EMULATED_CALL void tile_loadconfig(const void* config) {
    const auto* bytes = static_cast<const uint8_t*>(config);
    TileState& state = tiles();
    state = TileState{};
    require(bytes[0] == 1 && bytes[1] == 0);  // palette 1, no start row
    for (int tile = 0; tile < kTiles; ++tile) {
        uint16_t row_bytes;
        std::memcpy(&row_bytes, bytes + 16 + 2 * tile, sizeof row_bytes);
        state.row_bytes[tile] = row_bytes, state.rows[tile] = bytes[48 + tile];
        require(row_bytes <= 64 && state.rows[tile] <= 16 && (row_bytes == 0) == (state.rows[tile] == 0));
    }
    state.is_configured = true;
}

LOWBIT_EMULATED_CALL void tile_release() { tiles().is_configured = false; }

inline TileState& usable(int tile) {
    TileState& state = tiles();
    require(state.is_configured && state.rows[tile] > 0);
    return state;
}

LOWBIT_EMULATED_CALL void tile_zero(int tile) {
    TileState& state = usable(tile);
    std::memset(state.data[tile], 0, sizeof state.data[tile]);
}

LOWBIT_EMULATED_CALL void tile_loadd(int tile, const void* from, int64_t stride) {
    TileState& state = usable(tile);
    std::memset(state.data[tile], 0, sizeof state.data[tile]);
    for (int row = 0; row < state.rows[tile]; ++row)
        std::memcpy(state.data[tile][row], static_cast<const char*>(from) + row * stride,
                    static_cast<size_t>(state.row_bytes[tile]));
}

LOWBIT_EMULATED_CALL void tile_stored(int tile, void* to, int64_t stride) {
    const TileState& state = usable(tile);
    for (int row = 0; row < state.rows[tile]; ++row)
        std::memcpy(static_cast<char*>(to) + row * stride, state.data[tile][row], static_cast<size_t>(state.row_bytes[tile]));
}

struct Product {
    int rows, inner, columns;  // in 32-bit elements
};

// The shape of sum += a * b, which must match.
inline Product product_of(int sum, int a, int b) {
    const TileState& state = usable(sum);
    usable(a), usable(b);
    require(sum != a && sum != b && a != b);
    require(state.rows[a] == state.rows[sum] && state.row_bytes[b] == state.row_bytes[sum]);
    require(state.row_bytes[a] % 4 == 0 && state.row_bytes[sum] % 4 == 0 && state.row_bytes[a] / 4 == state.rows[b]);
    return {state.rows[sum], state.row_bytes[a] / 4, state.row_bytes[sum] / 4};
}

// Sums of int32 wrap.
template <typename A>
inline void multiply_bytes(int sum, int a, int b) {
    const Product shape = product_of(sum, a, b);
    TileState& state = tiles();
    for (int row = 0; row < shape.rows; ++row) {
        uint32_t sums[16];
        std::memcpy(sums, state.data[sum][row], sizeof sums);
        const auto* x = reinterpret_cast<const A*>(state.data[a][row]);
        for (int k = 0; k < shape.inner; ++k) {
            const auto* y = reinterpret_cast<const int8_t*>(state.data[b][k]);
            for (int column = 0; column < shape.columns; ++column)
                for (int i = 0; i < 4; ++i) sums[column] += static_cast<uint32_t>(x[4 * k + i] * y[4 * column + i]);
        }
        std::memcpy(state.data[sum][row], sums, sizeof sums);
    }
}
LOWBIT_EMULATED_CALL void tile_dpbusd(int sum, int a, int b) { multiply_bytes<uint8_t>(sum, a, b); }
LOWBIT_EMULATED_CALL void tile_dpbssd(int sum, int a, int b) { multiply_bytes<int8_t>(sum, a, b); }

// Even and odd elements are summed apart, from zero; both sums are added, then to what the tile held.
LOWBIT_EMULATED_CALL void tile_dpbf16ps(int sum, int a, int b) {
    const Product shape = product_of(sum, a, b);
    TileState& state = tiles();
    for (int row = 0; row < shape.rows; ++row) {
        const auto* x = reinterpret_cast<const uint16_t*>(state.data[a][row]);
        float parts[2][16] = {};
        for (int k = 0; k < shape.inner; ++k) {
            const auto* y = reinterpret_cast<const uint16_t*>(state.data[b][k]);
            for (int i = 0; i < 2; ++i) {
                const float factor = wide_bfloat16(x[2 * k + i]);
                for (int column = 0; column < shape.columns; ++column)
                    parts[i][column] = flushing_fma(factor, wide_bfloat16(y[2 * column + i]), parts[i][column]);
            }
        }
        auto* sums = reinterpret_cast<float*>(state.data[sum][row]);
        for (int column = 0; column < shape.columns; ++column) {
            const float added = without_subnormal(parts[0][column] + parts[1][column]);
            sums[column] = without_subnormal(without_subnormal(sums[column]) + added);
        }
    }
}

}  // namespace emulation
}  // namespace lowbit

#pragma GCC pop_options

#undef _tile_loadd
#undef _tile_stream_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbusd
#undef _tile_dpbssd
#undef _tile_dpbf16ps
#define _tile_loadconfig ::lowbit::emulation::tile_loadconfig
#define _tile_release ::lowbit::emulation::tile_release
#define _tile_zero ::lowbit::emulation::tile_zero
#define _tile_loadd ::lowbit::emulation::tile_loadd
#define _tile_stream_loadd ::lowbit::emulation::tile_loadd
#define _tile_stored ::lowbit::emulation::tile_stored
#define _tile_dpbusd ::lowbit::emulation::tile_dpbusd
#define _tile_dpbssd ::lowbit::emulation::tile_dpbssd
#define _tile_dpbf16ps ::lowbit::emulation::tile_dpbf16ps

#endif  // LOWBIT_NATIVE_EMULATION_TILES_H
