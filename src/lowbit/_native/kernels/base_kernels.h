// The kernels that every instruction set has.
#ifndef LOWBIT_NATIVE_KERNELS_BASE_KERNELS_H
#define LOWBIT_NATIVE_KERNELS_BASE_KERNELS_H

#include "elementwise.h"
#include "gguf.h"
#include "weight_only.h"

LOWBIT_BEGIN(base)

constexpr BaseKernels kernels = {
    /*quantize=*/
    {{quantize<float, Int8>, quantize<float, Uint8>, quantize<float, E4M3>},
     {quantize<BFloat16, Int8>, quantize<BFloat16, Uint8>, quantize<BFloat16, E4M3>},
     {quantize<Half, Int8>, quantize<Half, Uint8>, quantize<Half, E4M3>}},
    /*dequantize=*/
    {{dequantize<Int8, float>, dequantize<Int8, BFloat16>, dequantize<Int8, Half>},
     {nullptr, nullptr, nullptr},
     {dequantize<E4M3, float>, dequantize<E4M3, BFloat16>, dequantize<E4M3, Half>}},
    /*scale_product=*/{scale_product<float>, scale_product<BFloat16>, scale_product<Half>},
    /*decode_fp4=*/{decode_fp4<float>, decode_fp4<BFloat16>, decode_fp4<Half>},
    /*normalize=*/{normalize<float>, normalize<BFloat16>, normalize<Half>},
    /*gate=*/{gate<float>, gate<BFloat16>, gate<Half>},
    /*weight=*/
    {{multiply_weight<Int8>, multiply_weight<E4M3>, multiply_weight<Int4>, multiply_weight<E2M1>},
     decode_int4,
     split_activations,
     kTaskChannels},
    /*gguf=*/gguf_kernels,
    /*gguf_types=*/kGgufTypes,
};

LOWBIT_END
#endif  // LOWBIT_NATIVE_KERNELS_BASE_KERNELS_H
