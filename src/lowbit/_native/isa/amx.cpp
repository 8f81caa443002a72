#define LOWBIT_TARGET LOWBIT_TARGET_AMX

#include "../common.h"

#ifdef LOWBIT_HAVE_AMX
#include "../kernels/amx_grouped_rows.h"
#include "../kernels/amx_int8_few_rows.h"
#include "../kernels/attention_amx.h"
#include "../kernels/bfloat16_gguf.h"
#include "../kernels/bfloat16_run.h"

LOWBIT_BEGIN(gemm)

// Brings a job's input to tiles, for all products with it.
void arrange(TileKernel arrange_kernel, GemmArgs& args, int threads) {
    const int64_t row_groups = blocks(args.rows, kRowsTogether), depth = blocks(args.depth, kStep) * kStep;
    const int64_t scale_bytes = row_groups * kRowsTogether * static_cast<int64_t>(sizeof(float));
    args.tiles = scratch<uint8_t>(Slot::kTiles, row_groups * kRowsTogether * depth + scale_bytes);
    if (!args.row_scale) args.row_scale = reinterpret_cast<float*>(args.tiles + row_groups * kRowsTogether * depth);
    run(arrange_kernel, args, row_groups, args.rows * args.depth, threads);
}

void multiply_arranged(TileKernel multiply, GemmArgs args, int threads) {
    const int64_t group_columns = args.gated.data ? kGroupColumns / 2 : kGroupColumns;
    const int64_t row_groups = blocks(args.rows, kRowsTogether), groups = blocks(args.columns, group_columns);
    args.row_block = blocks(row_groups, blocks(4 * threads, groups)) * kRowsTogether;
    args.row_blocks = blocks(args.rows, args.row_block);
    args.call = next_product();
    constexpr int64_t kProductsPerElement = 256;  // multiply-adds in the time of one element of the other kernels
    const int64_t work = args.rows * args.columns * args.depth / kProductsPerElement;
    run(multiply, args, groups * args.row_blocks, work, threads, groups < 4 * threads ? 1 : args.row_blocks);
}

void multiply_many(GemmArgs args, int threads) {
    arrange(arrange_rows, args, threads);
    multiply_arranged(bfloat16_product, args, threads);
}

// Rows of int8 that are few enough not to rearrange the weights for.
bool are_few_int8(int64_t rows, bool is_gated) { return rows <= (is_gated ? 2 : 4) * kTileRows; }

// Brings few rows of int8 to tiles, for all products with them.
void arrange_few_int8(GemmArgs& args, int threads) {
    const int64_t steps = blocks(args.depth, kStep);
    args.tiles = scratch<uint8_t>(Slot::kTiles, steps * blocks(args.rows, kTileRows) * kTileBytes);
    run(transpose_rows, args, steps, args.rows * args.depth, threads);
}

void run_few_int8(const GemmArgs& args, int element_type, int threads) {
    const bool is_gated = args.gated.data, is_wide = args.rows <= 2 * kTileRows && !is_gated;
    const int64_t groups = blocks(args.columns, (is_wide ? 2 : 1) * kTileChannels);
    run(few_int8_products[is_gated][element_type], args, groups, args.columns * args.depth / 8, threads);
}

void int8_gemm(const Int8Gemm& gemm, int threads) {
    GemmArgs args{};
    args.input = gemm.x, args.rows = gemm.rows, args.depth = args.stride = gemm.depth;
    args.row_scale = const_cast<float*>(gemm.x_scale);
    args.weight = {gemm.weight, gemm.weight_scale, gemm.bias};
    args.columns = gemm.columns, args.output = gemm.output;
    if (are_few_int8(gemm.rows, false)) {
        const int64_t count = gemm.rows * gemm.depth;
        auto* const codes = scratch<uint8_t>(Slot::kCodes, count);
        for (int64_t i = 0; i < count; ++i) codes[i] = gemm.x[i] ^ 128;
        args.input = codes;
        arrange_few_int8(args, threads);
        run_few_int8(args, gemm.element_type, threads);
        return;
    }
    arrange(arrange_rows, args, threads);
    multiply_arranged(int8_products[0][gemm.element_type], args, threads);
}

// Rows from `first` on, of which `rows` are held at once.
void multiply_linears(const Int8Linears& linears, int64_t first, int64_t rows, int threads) {
    const int type = linears.element_type;
    const int64_t element_bytes = type == kFloat32 ? 4 : 2;
    const bool are_few = are_few_int8(rows, linears.is_gated);
    GemmArgs args{};
    args.input = static_cast<const char*>(linears.x) + first * linears.stride * element_bytes;
    args.rows = rows, args.depth = linears.depth, args.stride = linears.stride;
    if (are_few) {
        QuantizeJob job{};
        job.input = args.input, job.rows = rows, job.stride = linears.stride, job.block_rows = 1;
        job.columns = job.block_columns = linears.depth;
        job.output = scratch<uint8_t>(Slot::kCodes, rows * linears.depth);
        job.scale = scratch<float>(Slot::kScales, rows);
        run(avx512_kernels()->quantize[type][kCodeInt8], job, rows, rows * linears.depth, threads);
        args.input = job.output, args.stride = linears.depth, args.row_scale = job.scale;
        arrange_few_int8(args, threads);
    } else {
        arrange(quantizing_arrangements[type], args, threads);
    }
    for (int64_t i = 0; i < (linears.is_gated ? 1 : linears.count); ++i) {
        args.weight = {linears.weights[i], linears.weight_scales[i], linears.biases[i]};
        if (linears.is_gated) args.gated = {linears.weights[1], linears.weight_scales[1], linears.biases[1]};
        args.columns = linears.columns[i];
        args.output = static_cast<char*>(linears.outputs[i]) + first * args.columns * element_bytes;
        if (args.columns <= 0) continue;
        if (are_few) run_few_int8(args, type, threads);
        else multiply_arranged(int8_products[linears.is_gated][type], args, threads);
    }
}

void int8_linears(const Int8Linears& linears, int threads) {
    constexpr int64_t kRowsAtOnce = 1152;  // whose codes are held; each piece reads the whole weights
    for (int64_t first = 0; first < linears.rows; first += kRowsAtOnce)
        multiply_linears(linears, first, smaller(kRowsAtOnce, linears.rows - first), threads);
}

// Few rows times int8 with a scale a channel.
bool multiply_split_rows(const WeightJob& weight, GemmArgs args, int threads) {
    const int64_t rows = args.rows, split_rows = kBytesOfASplit * rows;
    if (weight.zero_point || !has_channel_scales(weight) || weight.depth > kMostExactInputs) return false;
    if (!are_few_int8(split_rows, false) || weight.columns % kTileChannels) return false;
    SplitJob split{};
    split.x = static_cast<const BFloat16*>(args.input), split.rows = rows;
    split.depth = weight.depth, split.stride = args.stride;
    split.codes = scratch<int8_t>(Slot::kCodes, split_rows * weight.depth);
    split.row_scale = scratch<float>(Slot::kScales, rows);
    run(split_rows_to_bytes, split, rows, rows * weight.depth, threads);
    args.input = split.codes, args.rows = split_rows, args.depth = args.stride = weight.depth;
    args.row_scale = split.row_scale, args.weight.column_scale = channel_scales(weight);
    arrange_few_int8(args, threads);
    const int64_t channels = (split_rows <= 2 * kTileRows ? 2 : 1) * kTileChannels;
    run(few_split_product, args, blocks(args.columns, channels), args.columns * args.depth / 8, threads);
    return true;
}

// Whether rows are multiplied with a weight's groups as integers, in tiles.
bool are_grouped_rows(const WeightJob& weight, const RowRange& range, int64_t rows) {
    const int64_t inputs = smaller(weight.block_columns, weight.depth);
    const bool are_groups =
        weight.scale_type <= kScaleBFloat16 && weight.block_rows == 1 && !weight.outer_scale && inputs % kStep == 0;
    const bool are_whole = weight.depth % kStep == 0 && weight.columns % kTileChannels == 0;
    return are_groups && are_whole && rows >= range.least && rows <= range.most;
}

// Few rows times int8 or int4 in groups.
bool multiply_grouped_rows(const WeightJob& weight, bool is_int4, GemmArgs args, int threads) {
    const int64_t rows = args.rows;
    if (!are_grouped_rows(weight, is_int4 ? kRowsOfInt4 : kRowsOfInt8, rows)) return false;
    const int64_t split_rows = kBytesOfAUnit * rows, inputs = smaller(weight.block_columns, weight.depth);
    const int64_t unit = inputs % kKTile ? kStep : kKTile, floats = blocks(weight.depth, unit) * kMostRows;
    UnitJob units{};
    units.x = static_cast<const BFloat16*>(args.input), units.rows = rows;
    units.depth = weight.depth, units.stride = args.stride, units.inputs = unit;
    units.is_even_first = is_int4, units.has_sums = weight.zero_point != nullptr;
    units.scale = is_int4 ? kNibbleScale : 1.0f;
    units.codes = scratch<int8_t>(Slot::kCodes, split_rows * weight.depth);
    units.scales = scratch<float>(Slot::kScales, 2 * floats), units.sums = units.scales + floats;
    run(round_units, units, rows, rows * weight.depth, threads);
    GroupScales groups{};
    groups.scales = weight.scale, groups.zero_points = weight.zero_point;
    groups.per_channel = blocks(weight.depth, inputs), groups.inputs = inputs, groups.unit_steps = unit / kStep;
    groups.row_scales = units.scales, groups.row_sums = units.sums;
    args.input = units.codes, args.rows = split_rows, args.depth = args.stride = weight.depth, args.groups = &groups;
    arrange_few_int8(args, threads);
    const auto& products = is_int4 ? grouped_products<Int4> : grouped_products<Int8>;
    run(products[weight.scale_type][weight.zero_point != nullptr], args, blocks(args.columns, kPairChannels),
        args.columns * args.depth / 8, threads);
    return true;
}

bool multiply_split(const WeightJob& weight, int weight_type, const GemmArgs& args, int threads) {
    if (weight_type != kWeightInt8 && weight_type != kWeightInt4) return false;
    if (weight_type == kWeightInt8 && multiply_split_rows(weight, args, threads)) return true;
    return multiply_grouped_rows(weight, weight_type == kWeightInt4, args, threads);
}

constexpr BFloat16Kernels bf16 = {
    {weight_decoder<Int8>, weight_decoder<E4M3>, weight_decoder<Int4>, weight_decoder<E2M1>},
    gguf_decoder,
    project_low_rank,
    multiply_few,
    multiply_many,
    nullptr,
    2,
};
constexpr AmxKernels amx = {int8_gemm, int8_linears, multiply_split, &amx_attention};

LOWBIT_END

namespace lowbit {

const BFloat16Kernels* amx_bf16_kernels() { return &gemm::bf16; }
const AmxKernels* amx_kernels() { return &gemm::amx; }

}  // namespace lowbit
#else
#include "../kernel_set.h"

namespace lowbit {

const BFloat16Kernels* amx_bf16_kernels() { return nullptr; }
const AmxKernels* amx_kernels() { return nullptr; }

}  // namespace lowbit
#endif
