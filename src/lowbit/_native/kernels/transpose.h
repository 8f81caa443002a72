// Transposition of 16 channels of up to 64 bytes to the layout that the dot-product instructions read.
#ifndef LOWBIT_NATIVE_KERNELS_TRANSPOSE_H
#define LOWBIT_NATIVE_KERNELS_TRANSPOSE_H

#include "quantize.h"

LOWBIT_BEGIN(vnni)

using base::narrow;
using base::store_narrow;
using base::widen;

constexpr int64_t kStep = 64;          // inputs that a register holds of one channel
constexpr int64_t kBytesAhead = 8192;  // prefetch distance of weights, bytes

// Inputs that are there of those from `input` on.
LOWBIT_INLINE __mmask64 present(int64_t input, int64_t depth) {
    return depth - input >= kStep ? ~__mmask64{0} : (__mmask64{1} << (depth - input)) - 1;
}

// 16 channels, `stride` bytes apart, of up to 64 inputs -> 16 groups [16 channels][4 inputs], zero where there are none:
// a transposition of 16 x 16 32-bit words.
LOWBIT_INLINE void pack_step(const int8_t* from, int64_t stride, __mmask64 mask, int8_t* to) {
    __m512i a[16], b[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) a[i] = _mm512_maskz_loadu_epi8(mask, from + i * stride);
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) {
        b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
        b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4) {  // a[i + j]: word 4 * lane + j of channels i ... i + 3
        a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
        a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
        a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
        a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
    }
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
        const __m512i low = _mm512_shuffle_i32x4(a[j], a[4 + j], 0x44), high = _mm512_shuffle_i32x4(a[j], a[4 + j], 0xee);
        const __m512i low2 = _mm512_shuffle_i32x4(a[8 + j], a[12 + j], 0x44);
        const __m512i high2 = _mm512_shuffle_i32x4(a[8 + j], a[12 + j], 0xee);
        _mm512_storeu_si512(to + 64 * j, _mm512_shuffle_i32x4(low, low2, 0x88));
        _mm512_storeu_si512(to + 64 * (4 + j), _mm512_shuffle_i32x4(low, low2, 0xdd));
        _mm512_storeu_si512(to + 64 * (8 + j), _mm512_shuffle_i32x4(high, high2, 0x88));
        _mm512_storeu_si512(to + 64 * (12 + j), _mm512_shuffle_i32x4(high, high2, 0xdd));
    }
}

LOWBIT_INLINE __m512i lane_numbers() { return _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15); }

LOWBIT_END
#endif  // LOWBIT_NATIVE_KERNELS_TRANSPOSE_H
