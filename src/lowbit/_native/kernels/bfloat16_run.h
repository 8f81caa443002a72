// How products of few rows of bfloat16 run: activations are transposed, the low-rank part projected, the weight multiplied.
#ifndef LOWBIT_NATIVE_KERNELS_BFLOAT16_RUN_H
#define LOWBIT_NATIVE_KERNELS_BFLOAT16_RUN_H

#include "bfloat16_decode.h"
#include "bfloat16_low_rank.h"

LOWBIT_BEGIN(gemm)

// Finds the hidden rows of args.low_rank; of `args` only the rows and the depth are used besides.
void project_low_rank(GemmArgs& args, int threads) {
    LowRank& low_rank = args.low_rank;
    const int64_t pieces = blocks(args.depth / 2, kPieceInputs), width = padded_rank(low_rank);
    low_rank.partial = scratch<float>(Slot::kPartialSums, pieces * args.rows * width);
    low_rank.hidden = scratch<BFloat16>(Slot::kHidden, args.rows * low_rank.rank);
    run(project_rows, args, pieces, args.depth * low_rank.rank, threads);
    add_pieces(args, pieces);
}

// Fills the tiles of args.low_rank.
void arrange_low_rank(const GemmArgs& args) {
    const LowRank& low_rank = args.low_rank;
    GemmArgs projected = args;
    projected.input = low_rank.hidden, projected.depth = projected.stride = 2 * low_rank.rank;
    projected.tiles = low_rank.tiles, projected.decoder = nullptr;
    transpose_rows(projected, 0, blocks(projected.depth, kStep));
}

void multiply_few(GemmArgs args, int threads) {
    const int64_t row_blocks = blocks(args.rows, kTileRows), steps = blocks(args.depth, kStep);
    const int64_t low_rank_steps = blocks(2 * args.low_rank.rank, kStep);
    args.tiles = scratch<uint8_t>(Slot::kTiles, row_blocks * (steps + low_rank_steps) * kTileBytes);
    run(transpose_rows, args, steps, args.rows * args.depth, threads);
    args.low_rank.tiles = args.tiles + row_blocks * steps * kTileBytes;
    if (args.low_rank.rank) project_low_rank(args, threads), arrange_low_rank(args);
    const int64_t groups = blocks(args.columns, channels_of_group(args.rows));
    run(args.decoder->multiply_few_rows, args, groups, args.columns * args.depth / 8, threads);
}

LOWBIT_END
#endif  // LOWBIT_NATIVE_KERNELS_BFLOAT16_RUN_H
