// What each unit of isa/ offers, and what is selected of it.
#ifndef LOWBIT_NATIVE_KERNEL_SET_H
#define LOWBIT_NATIVE_KERNEL_SET_H

#include "common.h"

namespace lowbit {

template <typename Job>
using Kernel = void (*)(const Job&, int64_t, int64_t);  // tasks [first, last)

struct WeightKernels {
    Kernel<WeightJob> multiply[kWeightTypes];
    Kernel<WeightJob> decode_int4;
    void (*split)(WeightJob&);  // deinterleaves the activations of e2m1 where that is faster; they live in the caller's scratch
    int64_t task_channels;
};

// Of one block type.
struct GgufKernels {
    int number, elements, bytes;
    Kernel<GgufJob> decode;
    Kernel<GgufProductJob> multiply;  // null where the instruction set has none
};

// Generic code, AVX2 and AVX-512 have all of this.
struct BaseKernels {
    Kernel<QuantizeJob> quantize[kElementTypes][kCodeTypes];
    Kernel<DequantizeJob> dequantize[kCodeTypes][kElementTypes];  // none of uint8
    Kernel<ScaleJob> scale_product[kElementTypes];
    Kernel<Fp4Job> decode_fp4[kElementTypes];
    Kernel<NormalizeJob> normalize[kElementTypes];
    Kernel<GateJob> gate[kElementTypes];
    WeightKernels weight;
    const GgufKernels* gguf;
    int gguf_types;
};

struct UnitRowsKernels {
    // Of float32 in the order of split activations, and in their own: float32, bfloat16. Only the last may be there.
    UnitRowsKernel arrange[3];
    const UnitRowsKernel* multiply;  // by the number of rows, less one
    int64_t unit_bytes, unit_floats;
};

struct AttentionKernels {
    int64_t (*head_bytes)(const AttentionJob&);
    Kernel<AttentionJob> prepare[kElementTypes];
    Kernel<AttentionJob> attend[kElementTypes];
    int64_t rows;
    int64_t prepared_keys;  // of all heads that a task prepares; 0: all keys of a head
};

// Rows of uint8 (int8 + 128) times a weight of int8.
struct Int8Gemm {
    const uint8_t* x;
    int64_t rows, depth;
    const float* x_scale;
    const int8_t* weight;
    int64_t columns;
    const float *weight_scale, *bias;
    void* output;
    int element_type;
};

// Rows that are quantized to int8 and multiplied with several weights.
struct Int8Linears {
    const void* x;
    int element_type;
    int64_t rows, depth, stride, count;
    const int8_t* const* weights;
    const int64_t* columns;
    const float *const *weight_scales, *const *biases;
    void* const* outputs;
    bool is_gated;
};

struct VnniKernels {
    void (*int8_gemm)(const Int8Gemm&, int threads);
    const UnitRowsKernels* (*weight_rows)(const WeightJob&, int weight_type);  // null where there are none
    const UnitRowsKernels* (*gguf_rows)(const GgufRows&, int64_t depth);       // likewise
    const AttentionKernels* attention;                                         // [kAttentionBFloat16]
};

// Rows of bfloat16 times weights that are decoded to it.
struct BFloat16Kernels {
    BFloat16Decoder (*weight_decoders[kWeightTypes])(const WeightJob&);
    BFloat16Decoder (*gguf_decoder)(const GgufRows&);
    void (*project_low_rank)(GemmArgs&, int threads);  // finds the hidden rows of low_rank
    void (*multiply_few)(GemmArgs, int threads);       // up to kMaxFewRows rows
    void (*multiply_many)(GemmArgs, int threads);
    const UnitRowsKernels* (*weight_rows)(const WeightJob&, int weight_type);  // null, or null where there are none
    int64_t max_unit_rows;  // beyond which decoding takes less time than what UnitRowsKernels do
};

constexpr int64_t kMaxFewRows = 64;

struct AmxKernels {
    void (*int8_gemm)(const Int8Gemm&, int threads);
    void (*int8_linears)(const Int8Linears&, int threads);
    // GEMV and few rows of bfloat16 as integers; false where a weight or the rows are not made for it.
    bool (*multiply_split)(const WeightJob&, int weight_type, const GemmArgs&, int threads);
    const AttentionKernels* attention;
};

// By the unit that is named; null where the compiler has not built it.
const BaseKernels* generic_kernels();
const BaseKernels* avx2_kernels();
const BaseKernels* avx512_kernels();
const VnniKernels* vnni_kernels();
const BFloat16Kernels* bf16_kernels();
const BFloat16Kernels* amx_bf16_kernels();
const AmxKernels* amx_kernels();

// What an instruction set selects.
struct KernelSet {
    int isa;
    const BaseKernels* base;
    const VnniKernels* vnni;
    const BFloat16Kernels* bf16;
    const AmxKernels* amx;
};

}  // namespace lowbit

#endif  // LOWBIT_NATIVE_KERNEL_SET_H
