// The first half of a low-rank product of few rows: x [rows, depth] times down [depth, rank], rounded to bfloat16. Its second
// half is added within a product of few rows.
//
// Pieces of inputs are multiplied one by one and their sums added in their order, whatever thread had which.
#ifndef LOWBIT_NATIVE_KERNELS_BFLOAT16_LOW_RANK_H
#define LOWBIT_NATIVE_KERNELS_BFLOAT16_LOW_RANK_H

#include "bfloat16_rows.h"

#if LOWBIT_TARGET == LOWBIT_TARGET_AMX
#include "amx_product.h"
#endif

LOWBIT_BEGIN(gemm)

constexpr int64_t kPieceInputs = 512;
constexpr int64_t kRankTile = 16;
constexpr int64_t kRowsOfPass = 4;

inline int64_t padded_rank(const LowRank& low_rank) { return blocks(low_rank.rank, kRankTile) * kRankTile; }

// 16 columns from `column` on of inputs [first, last) of down -> [pairs of inputs][16 columns][2].
LOWBIT_INLINE void pair_inputs(const LowRank& low_rank, int64_t column, int64_t first, int64_t last, BFloat16 (*pairs)[32]) {
    const __mmask16 mask = column_mask(low_rank.rank - column);
    for (int64_t input = first; input < last; input += 2, ++pairs) {
        const BFloat16* from = low_rank.down + input * low_rank.rank + column;
        const __m512i even = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, from));
        const __m512i odd = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, from + low_rank.rank));
        _mm512_storeu_si512(*pairs, _mm512_or_si512(even, _mm512_slli_epi32(odd, 16)));
    }
}

// kRows rows of x [.., 2 * count], `stride` apart, times pairs [count][16][2] -> sums, rows `width` apart.
template <int kRows>
LOWBIT_INLINE void multiply_pairs(const BFloat16* x, int64_t stride, const BFloat16 (*pairs)[32], int64_t count, float* sums,
                                  int64_t width) {
    __m512 even[kRows], odd[kRows];
    for (int row = 0; row < kRows; ++row) even[row] = odd[row] = _mm512_setzero_ps();
    const auto add = [&](__m512* total, int64_t pair) LOWBIT_INLINE_LAMBDA {
        const __m512i weight = _mm512_loadu_si512(pairs[pair]);
        for (int row = 0; row < kRows; ++row) {
            int32_t both;
            std::memcpy(&both, x + row * stride + 2 * pair, sizeof both);
            const __m512i inputs = _mm512_set1_epi32(both);
            total[row] = _mm512_dpbf16_ps(total[row], reinterpret_cast<const __m512bh&>(inputs),
                                          reinterpret_cast<const __m512bh&>(weight));
        }
    };
    int64_t pair = 0;
    for (; pair + 2 <= count; pair += 2) add(even, pair), add(odd, pair + 1);
    if (pair < count) add(even, pair);
    for (int row = 0; row < kRows; ++row) _mm512_storeu_ps(sums + row * width, _mm512_add_ps(even[row], odd[row]));
}

#ifdef LOWBIT_TILES
// Likewise kTileRows rows and whole steps of 32 inputs, in tiles.
LOWBIT_INLINE void multiply_pairs_in_tiles(const BFloat16* x, int64_t stride, const BFloat16 (*pairs)[32], int64_t count,
                                           float* sums, int64_t width) {
    _tile_zero(0);
    __asm__ volatile("" ::: "memory");  // the intrinsics do not say that they read it
    for (int64_t pair = 0; pair < count; pair += kTileRows) {
        _tile_loadd(1, x + 2 * pair, stride * sizeof(BFloat16));
        _tile_loadd(2, pairs[pair], kStep);
        _tile_dpbf16ps(0, 1, 2);
    }
    _tile_stored(0, sums, width * sizeof(float));
}
#endif

// Pieces [first, last) of the inputs -> partial sums [pieces][rows][padded rank].
void project_rows(const GemmArgs& job, int64_t first, int64_t last) {
    const LowRank& low_rank = job.low_rank;
    const int64_t width = padded_rank(low_rank);
    alignas(64) BFloat16 pairs[kPieceInputs / 2][32];
#ifdef LOWBIT_TILES
    configure_tiles();
#endif
    for (int64_t piece = first; piece < last; ++piece) {
        const int64_t begin = piece * kPieceInputs, end = smaller(begin + kPieceInputs, job.depth / 2), count = (end - begin) / 2;
        for (int64_t column = 0; column < low_rank.rank; column += kRankTile) {
            pair_inputs(low_rank, column, begin, end, pairs);
            const BFloat16* x = low_rank.x + begin;
            float* sums = low_rank.partial + piece * job.rows * width + column;
            int64_t row = 0;
#ifdef LOWBIT_TILES
            for (; count % kTileRows == 0 && row + kTileRows <= job.rows; row += kTileRows)
                multiply_pairs_in_tiles(x + row * low_rank.x_stride, low_rank.x_stride, pairs, count, sums + row * width, width);
#endif
            for (; row + kRowsOfPass <= job.rows; row += kRowsOfPass)
                multiply_pairs<kRowsOfPass>(x + row * low_rank.x_stride, low_rank.x_stride, pairs, count, sums + row * width,
                                            width);
            for (; row < job.rows; ++row)
                multiply_pairs<1>(x + row * low_rank.x_stride, low_rank.x_stride, pairs, count, sums + row * width, width);
        }
    }
#ifdef LOWBIT_TILES
    _tile_release();
#endif
}

// Partial sums -> hidden [rows, rank].
void add_pieces(const GemmArgs& job, int64_t pieces) {
    const LowRank& low_rank = job.low_rank;
    const int64_t width = padded_rank(low_rank);
    for (int64_t row = 0; row < job.rows; ++row) {
        for (int64_t column = 0; column < low_rank.rank; column += kRankTile) {
            __m512 sum = _mm512_setzero_ps();
            for (int64_t piece = 0; piece < pieces; ++piece)
                sum = _mm512_add_ps(sum, _mm512_loadu_ps(low_rank.partial + (piece * job.rows + row) * width + column));
            store_narrow(low_rank.hidden + row * low_rank.rank + column, column_mask(low_rank.rank - column), sum);
        }
    }
}

LOWBIT_END
#endif  // LOWBIT_NATIVE_KERNELS_BFLOAT16_LOW_RANK_H
