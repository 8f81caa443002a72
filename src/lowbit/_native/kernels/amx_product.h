// Products by AMX, whose instruction multiplies 16 rows of 64 bytes with 64 bytes of each of 16 channels: uint8 activations
// (int8 + 128) with int8 weights, or bfloat16 with bfloat16.
//
// Activations are brought to tiles first, 32 rows together, in the order in which they are read. Of the weights, read as
// they are in a checkpoint, the panels of int8_product.h are made, 192 channels of 4096 bytes at a time; they stay in the
// second-level cache while all rows pass by. Of 32 rows and 32 channels four tiles of sums are held; what was summed before
// is scaled and written between the instructions that sum the next, which leave the other units idle.
#ifndef LOWBIT_NATIVE_KERNELS_AMX_PRODUCT_H
#define LOWBIT_NATIVE_KERNELS_AMX_PRODUCT_H

#include "bfloat16_rows.h"
#include "elementwise.h"
#include "../runtime.h"

LOWBIT_BEGIN(gemm)

constexpr int64_t kRowsTogether = 32;
constexpr int64_t kGroupPanels = 12;
constexpr int64_t kGroupColumns = kGroupPanels * kPanelChannels;
constexpr int64_t kDepthSteps = 64;  // of 64 bytes each
constexpr int64_t kStripSteps = 15;  // so that 32 rows of them stay in the first-level cache while the panels pass

struct alignas(64) TileShape {  // as the instruction that configures the tiles reads it
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
const TileShape kWholeTiles;  // in memory: the intrinsic does not say how much of it is read

LOWBIT_INLINE void configure_tiles() { _tile_loadconfig(&kWholeTiles); }

// Rows of `bytes` bytes -> tiles [32 rows][64 bytes] one after the other, zero beyond the last row and byte.
LOWBIT_INLINE void store_row(const uint8_t* row, int64_t bytes, uint8_t* tiles, const BFloat16Decoder* decoder = nullptr) {
    for (int64_t i = 0; i < bytes; i += kStep, tiles += 2 * kTileBytes)
        _mm512_store_si512(tiles, reorder(decoder, _mm512_maskz_loadu_epi8(present(i, bytes), row + i)));
}

LOWBIT_INLINE void clear_rows(int64_t first, int64_t steps, uint8_t* tiles) {
    for (int64_t row = first; row < kRowsTogether; ++row)
        for (int64_t step = 0; step < steps; ++step)
            _mm512_store_si512(tiles + (step * kRowsTogether + row) * kStep, _mm512_setzero_si512());
}

// Blocks [first, last) of 32 rows.
void arrange_rows(const GemmArgs& job, int64_t first, int64_t last) {
    const int64_t steps = blocks(job.depth, kStep);
    for (int64_t block = first; block < last; ++block) {
        const int64_t top = block * kRowsTogether, rows = smaller(kRowsTogether, job.rows - top);
        uint8_t* tiles = job.tiles + top * steps * kStep;
        for (int64_t row = 0; row < rows; ++row)
            store_row(static_cast<const uint8_t*>(job.input) + (top + row) * job.stride, job.depth, tiles + row * kStep,
                      job.decoder);
        clear_rows(rows, steps, tiles);
    }
}

// As above, of rows that are quantized on the way to uint8 (int8 + 128).
template <typename Input>
void quantize_and_arrange(const GemmArgs& job, int64_t first, int64_t last) {
    const int64_t steps = blocks(job.depth, kStep);
    auto* const codes = scratch<Uint8>(Slot::kQuantizedRow, job.depth);
    QuantizeJob quantization{};
    quantization.rows = quantization.block_rows = 1;
    quantization.columns = quantization.block_columns = job.depth;
    quantization.output = codes;
    for (int64_t block = first; block < last; ++block) {
        const int64_t top = block * kRowsTogether, rows = smaller(kRowsTogether, job.rows - top);
        uint8_t* tiles = job.tiles + top * steps * kStep;
        for (int64_t row = 0; row < rows; ++row) {
            const Input* input = static_cast<const Input*>(job.input) + (top + row) * job.stride;
            quantization.input = input, quantization.scale = job.row_scale + top + row;
            base::quantize<Input, Uint8>(quantization, 0, 1);
            store_row(&codes->bits, job.depth, tiles + row * kStep);
        }
        clear_rows(rows, steps, tiles);
    }
}

struct AmxInt8 {
    using Sum = int32_t;
    static constexpr bool has_offset = true, is_gated = false;
};

struct AmxGatedInt8 : AmxInt8 {  // panels of both weights in turn
    static constexpr bool is_gated = true;
};

struct AmxBFloat16 {
    using Sum = float;
    static constexpr bool has_offset = false, is_gated = false;
};

// Tiles 0 ... 3 are the sums of two by two tiles, 4 and 5 activations, 6 and 7 weights.
#define LOWBIT_TILE_DOT(Kind, sum, x, weight)                         \
    do {                                                              \
        if constexpr (Kind::has_offset) _tile_dpbusd(sum, x, weight); \
        else _tile_dpbf16ps(sum, x, weight);                          \
    } while (0)

// The panels that a thread packed last, and of int8 the sums of their channels times 128.
struct AmxPanels {
    alignas(64) uint8_t panels[kGroupColumns * kDepthSteps * kStep];
    alignas(64) int32_t offsets[kGroupColumns];
    Decoded decoded;
    int64_t call = 0, column, depth;
};

// A panel of inputs from byte `first` on of the channels from `channel` on.
template <typename Kind>
LOWBIT_INLINE void pack_weight(const GemmArgs& job, const TileWeight& weight, int64_t channel, int64_t first, int64_t bytes,
                               AmxPanels& packed, int64_t panel) {
    const int64_t channels = smaller(kPanelChannels, job.columns - channel), panel_bytes = blocks(bytes, kStep) * kTileBytes;
    uint8_t* to = packed.panels + panel * panel_bytes;
    if (job.decoder) pack_decoded(job, weight.data, channel, first, bytes, packed.decoded, to);
    else pack_panel(static_cast<const int8_t*>(weight.data) + channel * job.depth + first, job.depth, channels, bytes, to);
    if (!Kind::has_offset) return;
    __m512i sums = _mm512_setzero_si512();
    for (int64_t i = 0; i < panel_bytes; i += kStep)
        sums = _mm512_dpbusd_epi32(sums, _mm512_set1_epi8(1), _mm512_load_si512(to + i));
    __m512i* offsets = reinterpret_cast<__m512i*>(packed.offsets + panel * kPanelChannels);
    const __m512i before = first == 0 ? _mm512_setzero_si512() : _mm512_load_si512(offsets);
    _mm512_store_si512(offsets, _mm512_add_epi32(before, _mm512_slli_epi32(sums, 7)));
}

// Channels of the output that a group's panels hold.
template <typename Kind>
constexpr int64_t kColumnsOf = Kind::is_gated ? kGroupColumns / 2 : kGroupColumns;

template <typename Kind>
void pack_group(const GemmArgs& job, int64_t column, int64_t first, AmxPanels& packed) {
    const int64_t bytes = smaller(kDepthSteps * kStep, job.depth - first);
    const int64_t end = smaller(column + kColumnsOf<Kind>, job.columns);
    int64_t panel = 0;
    for (int64_t channel = column; channel < end; channel += kPanelChannels) {
        pack_weight<Kind>(job, job.weight, channel, first, bytes, packed, panel++);
        if (Kind::is_gated) pack_weight<Kind>(job, job.gated, channel, first, bytes, packed, panel++);
    }
}

// 32 rows by 32 channels of sums, [2][2][16][16], that wait to be written.
template <typename Kind, typename Output>
struct Waiting {
    const typename Kind::Sum* sums;
    const int32_t* offsets;
    int64_t row, rows, column;
    __mmask16 masks[2];

    Waiting() : rows(0) {}
    Waiting(const GemmArgs& job, const void* all, const int32_t* of_channels, int64_t top, int64_t count, int64_t first)
        : sums(static_cast<const typename Kind::Sum*>(all)),
          offsets(of_channels),
          row(top),
          rows(count),
          column(first),
          masks{column_mask(job.columns - first), column_mask(job.columns - first - kPanelChannels)} {}

    void write_all(const GemmArgs& job) {
        for (int64_t i = 0; i < rows; ++i) write(job, i);
        rows = 0;
    }

    // Row i of the panel `side`.
    LOWBIT_INLINE_LAMBDA inline __m512 result(const GemmArgs& job, const TileWeight& weight, int64_t i, int64_t side,
                                              int64_t channel, __mmask16 mask) const {
        const typename Kind::Sum* from = sums + ((i / 16 * 2 + side) * 16 + i % 16) * 16;
        __m512 value;
        if constexpr (Kind::has_offset) {
            const __m512i offset = _mm512_load_si512(offsets + side * kPanelChannels);
            const __m512i exact = _mm512_sub_epi32(_mm512_load_si512(from), offset);  // back in int32, if not before
            value = _mm512_mul_ps(_mm512_cvtepi32_ps(exact), _mm512_set1_ps(job.row_scale[row + i]));
            value = _mm512_mul_ps(value, _mm512_maskz_loadu_ps(mask, weight.column_scale + channel));
        } else {
            value = _mm512_load_ps(from);
            if (weight.column_scale) value = _mm512_mul_ps(value, _mm512_maskz_loadu_ps(mask, weight.column_scale + channel));
        }
        return weight.bias ? _mm512_add_ps(value, _mm512_maskz_loadu_ps(mask, weight.bias + channel)) : value;
    }

    LOWBIT_INLINE_LAMBDA inline void write(const GemmArgs& job, int64_t i) const {
        Output* to = static_cast<Output*>(job.output) + (row + i) * job.columns + column;
        if constexpr (Kind::is_gated) {
            const __m512 gate = result(job, job.weight, i, 0, column, masks[0]);
            const __m512 value = result(job, job.gated, i, 1, column, masks[0]);
            store_narrow(to, masks[0], _mm512_mul_ps(base::silu(gate), value));
        } else {
            for (int64_t side = 0; side < 2; ++side) {
                const int64_t channel = side * kPanelChannels;
                store_narrow(to + channel, masks[side], result(job, job.weight, i, side, column + channel, masks[side]));
            }
        }
    }
};

// One call's part of the depth of 32 rows by 32 channels: onto what `sums` holds, or from zero.
struct TileStrip {
    const uint8_t* x;       // [steps][32 rows][64 bytes]
    const uint8_t* weight;  // [steps][16 groups][64 bytes] of each of two panels
    int64_t panel_bytes, steps;
    bool accumulate;
    uint8_t* sums;  // [2][2][16][16]
};

// A place from which on memory is asked for what comes next.
struct Ahead {
    const uint8_t* at;
    int64_t lines;  // a step

    LOWBIT_INLINE_LAMBDA inline void fetch() {
        for (int64_t i = 0; i < lines; ++i, at += 64) _mm_prefetch(reinterpret_cast<const char*>(at), _MM_HINT_T1);
    }
};

// Between the steps other work is done, for which the products leave time.
template <typename Kind, typename Work>
LOWBIT_INLINE void multiply_strip(const TileStrip& strip, Work work) {
    __asm__ volatile("" ::: "memory");  // the intrinsics do not say that they read it
    if (strip.accumulate) {
        _tile_loadd(0, strip.sums, 64);
        _tile_loadd(1, strip.sums + kTileBytes, 64);
        _tile_loadd(2, strip.sums + 2 * kTileBytes, 64);
        _tile_loadd(3, strip.sums + 3 * kTileBytes, 64);
    } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
    const uint8_t *x = strip.x, *weight = strip.weight, *second = weight + strip.panel_bytes;
    for (int64_t step = 0; step < strip.steps; ++step, x += 2 * kTileBytes, weight += kTileBytes, second += kTileBytes) {
        _tile_stream_loadd(6, weight, 64);  // so as not to drive x from the first-level cache
        _tile_loadd(4, x, 64);
        LOWBIT_TILE_DOT(Kind, 0, 4, 6);
        _tile_stream_loadd(7, second, 64);
        LOWBIT_TILE_DOT(Kind, 1, 4, 7);
        _tile_loadd(5, x + kTileBytes, 64);
        LOWBIT_TILE_DOT(Kind, 2, 5, 6);
        LOWBIT_TILE_DOT(Kind, 3, 5, 7);
        work();
    }
    _tile_stored(0, strip.sums, 64);
    _tile_stored(1, strip.sums + kTileBytes, 64);
    _tile_stored(2, strip.sums + 2 * kTileBytes, 64);
    _tile_stored(3, strip.sums + 3 * kTileBytes, 64);
}

// Tasks [first, last): task t is block t % row_blocks of rows of the group t / row_blocks of 192 channels.
template <typename Kind, typename Output>
void multiply_tiles(const GemmArgs& job, int64_t first, int64_t last) {
    auto& packed = scratch_object<AmxPanels>(Slot::kAmxPanels);
    const int64_t all_steps = blocks(job.depth, kStep);
    const bool is_deep = all_steps > kDepthSteps;
    // The sums of 32 rows; of all where not all the depth is packed at once.
    auto* const sums = scratch<uint8_t>(Slot::kAmxSums, (is_deep ? job.row_block : kRowsTogether) * kGroupColumns * 4);
    configure_tiles();
    Waiting<Kind, Output> waiting{};
    for (int64_t task = first; task < last; ++task) {
        constexpr int64_t kPanelsAColumn = Kind::is_gated ? 2 : 1;
        const int64_t column = task / job.row_blocks * kColumnsOf<Kind>;
        const int64_t columns = smaller(kColumnsOf<Kind>, job.columns - column);
        const int64_t panels = blocks(columns, kPanelChannels) * kPanelsAColumn;
        const int64_t top = task % job.row_blocks * job.row_block, bottom = smaller(top + job.row_block, job.rows);
        for (int64_t depth = 0; depth < all_steps; depth += kDepthSteps) {
            const int64_t steps = smaller(kDepthSteps, all_steps - depth),
                          strip_steps = blocks(steps, blocks(steps, kStripSteps));
            if (packed.call != job.call || packed.column != column || packed.depth != depth) {
                waiting.write_all(job);  // with the offsets of before
                pack_group<Kind>(job, column, depth * kStep, packed);
                packed.call = job.call, packed.column = column, packed.depth = depth;
            }
            for (int64_t row = top; row < bottom; row += kRowsTogether) {
                const uint8_t* x = job.tiles + (row * all_steps + depth * kRowsTogether) * kStep;
                Ahead ahead{x + all_steps * 2 * kTileBytes, blocks(kRowsTogether, blocks(panels, 2))};
                uint8_t* const row_sums = is_deep ? sums + (row - top) * kGroupColumns * 4 : sums;
                for (int64_t step = 0; step < steps; step += strip_steps) {
                    for (int64_t panel = 0; panel < panels; panel += 2) {
                        const TileStrip strip{x + step * 2 * kTileBytes, packed.panels + (panel * steps + step) * kTileBytes,
                                              steps * kTileBytes,        smaller(strip_steps, steps - step),
                                              depth + step != 0,         row_sums + panel * 2 * kTileBytes};
                        const int64_t rows_a_step = blocks(waiting.rows, strip.steps);
                        int64_t written = 0;
                        multiply_strip<Kind>(strip, [&]() LOWBIT_INLINE_LAMBDA {
                            ahead.fetch();
                            const int64_t end = smaller(written + rows_a_step, waiting.rows);
                            for (; written < end; ++written) waiting.write(job, written);
                        });
                        waiting.rows = 0;
                        if (depth + step + strip.steps == all_steps)
                            waiting = Waiting<Kind, Output>(job, strip.sums, packed.offsets + panel * kPanelChannels, row,
                                                            smaller(kRowsTogether, bottom - row),
                                                            column + panel / kPanelsAColumn * kPanelChannels);
                    }
                }
            }
        }
    }
    waiting.write_all(job);
    _tile_release();
}

constexpr TileKernel quantizing_arrangements[3] = {quantize_and_arrange<float>, quantize_and_arrange<BFloat16>,
                                                   quantize_and_arrange<Half>};
constexpr TileKernel int8_products[2][3] = {
    {multiply_tiles<AmxInt8, float>, multiply_tiles<AmxInt8, BFloat16>, multiply_tiles<AmxInt8, Half>},
    {multiply_tiles<AmxGatedInt8, float>, multiply_tiles<AmxGatedInt8, BFloat16>, multiply_tiles<AmxGatedInt8, Half>}};
constexpr TileKernel bfloat16_product = multiply_tiles<AmxBFloat16, BFloat16>;

LOWBIT_END
#endif  // LOWBIT_NATIVE_KERNELS_AMX_PRODUCT_H
