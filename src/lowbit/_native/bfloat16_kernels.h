// What this instruction set has for bfloat16 times decoded weights.

constexpr BFloat16Kernels bfloat16_kernels = {
    {weight_decoder<Int8>, weight_decoder<E4M3>, weight_decoder<Int4>, weight_decoder<E2M1>},
    gguf_decoder, transpose_rows, channels_of_group, project_rows, add_pieces};
