// What an instruction set has for bfloat16 times decoded weights, beside the products themselves.

#include "bfloat16_low_rank.h"
#include "bfloat16_decode.h"
#define LOWBIT_AVX512 1
#include "gguf_blocks.h"
#undef LOWBIT_AVX512
#include "bfloat16_gguf.h"

constexpr BFloat16Kernels bfloat16_kernels = {
    {weight_decoder<Int8>, weight_decoder<E4M3>, weight_decoder<Int4>, weight_decoder<E2M1>},
    gguf_decoder, transpose_rows, channels_of_group, project_rows, add_pieces};
