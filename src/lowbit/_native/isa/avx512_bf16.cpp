#define LOWBIT_TARGET LOWBIT_TARGET_AVX512_BF16

#include "../common.h"

#ifdef LOWBIT_HAVE_BF16
#include "../kernels/bfloat16_gguf.h"
#include "../kernels/bfloat16_product.h"
#include "../kernels/bfloat16_run.h"
#include "../kernels/bfloat16_units.h"

LOWBIT_BEGIN(gemm)

void multiply_many(GemmArgs args, int threads) {
    if (!are_arranged(args)) {
        args.tiles = scratch<uint8_t>(Slot::kTiles, args.rows * step_bytes_of(args));
        run(arrange_rows, args, args.rows, args.rows * args.depth, threads);
    }
    const int64_t groups = blocks(args.columns, kVectorColumns), wanted = blocks(4 * threads, groups);
    args.row_block = smaller(blocks(blocks(args.rows, wanted), kVectorRows) * kVectorRows, kMostVectorRows);
    args.row_blocks = blocks(args.rows, args.row_block);
    args.call = next_product();
    constexpr int64_t kProductsPerElement = 32;  // multiply-adds in the time of one element of the other kernels
    const int64_t work = args.rows * args.columns * args.depth / 2 / kProductsPerElement;
    run(multiply_many_rows, args, groups * args.row_blocks, work, threads, groups < 4 * threads ? 1 : args.row_blocks);
}

constexpr BFloat16Kernels kernels = {
    {weight_decoder<Int8>, weight_decoder<E4M3>, weight_decoder<Int4>, weight_decoder<E2M1>},
    gguf_decoder,
    project_low_rank,
    multiply_few,
    multiply_many,
    weight_rows,
    kFewRows,
};

LOWBIT_END

namespace lowbit {

const BFloat16Kernels* bf16_kernels() { return &gemm::kernels; }

}  // namespace lowbit
#else
#include "../kernel_set.h"

namespace lowbit {

const BFloat16Kernels* bf16_kernels() { return nullptr; }

}  // namespace lowbit
#endif
