#define LOWBIT_TARGET LOWBIT_TARGET_AVX512_VNNI

#include "../common.h"

#ifdef LOWBIT_HAVE_X86
#include "../kernels/attention_float32.h"
#include "../kernels/attention_integers.h"
#include "../kernels/integer_gguf.h"

LOWBIT_BEGIN(vnni)

void int8_gemm(const Int8Gemm& gemm, int threads) {
    const int64_t groups = blocks(gemm.columns, kVectorColumns);
    // Blocks of rows small enough to give every thread several tasks, in whole tiles together with the row of ones.
    const int64_t wanted = blocks(4 * threads, groups);
    const int64_t tiles = blocks(blocks(gemm.rows, wanted) + 1, kVectorRows);
    const int64_t most = gemm.rows <= kMostRowsAlong ? gemm.rows : tiles * kVectorRows - 1;
    ProductJob job{};
    job.x = gemm.x, job.x_scale = gemm.x_scale;
    job.weight = gemm.weight, job.weight_scale = gemm.weight_scale, job.bias = gemm.bias;
    job.rows = gemm.rows, job.columns = gemm.columns, job.depth = gemm.depth;
    job.row_block = smaller(most, kLargestRowBlock), job.row_blocks = blocks(gemm.rows, job.row_block);
    job.output = gemm.output, job.call = next_product();
    constexpr int64_t kProductsPerElement = 64;  // multiply-adds in the time of one element of the other kernels
    const int64_t work = gemm.columns * gemm.depth / 4 + gemm.rows * gemm.columns * gemm.depth / kProductsPerElement;
    // One thread takes all rows of a group of panels where there are groups enough: then it alone packs them.
    const int64_t unit = groups < 4 * threads ? 1 : job.row_blocks;
    run(multiplications[gemm.element_type], job, groups * job.row_blocks, work, threads, unit);
}

template <typename Kind>
constexpr AttentionKernels integer_attention = {
    head_bytes<typename Kind::Element>,
    {prepare_integers<Kind, float>, prepare_integers<Kind, BFloat16>, prepare_integers<Kind, Half>},
    {attend_integers<Kind, float>, attend_integers<Kind, BFloat16>, attend_integers<Kind, Half>},
    kIntegerRows,
    0};

constexpr AttentionKernels attentions[kAttentionBFloat16] = {
    {head_bytes<float>,
     {prepare_float<float, false>, prepare_float<BFloat16, false>, prepare_float<Half, false>},
     {attend_float<float, false>, attend_float<BFloat16, false>, attend_float<Half, false>},
     kFloatRows,
     0},
    integer_attention<Attention8>,
    {head_bytes<float>,
     {prepare_float<float, true>, prepare_float<BFloat16, true>, prepare_float<Half, true>},
     {attend_float<float, true>, attend_float<BFloat16, true>, attend_float<Half, true>},
     kFloatRows,
     0},
    integer_attention<Attention16>,
};

constexpr VnniKernels kernels = {int8_gemm, weight_rows, gguf_rows, attentions};

LOWBIT_END

namespace lowbit {

const VnniKernels* vnni_kernels() { return &vnni::kernels; }

}  // namespace lowbit
#else
#include "../kernel_set.h"

namespace lowbit {

const VnniKernels* vnni_kernels() { return nullptr; }

}  // namespace lowbit
#endif
