// Which instruction set a unit is compiled for, and how its code is marked.
//
// A unit of isa/ defines LOWBIT_TARGET before it includes kernels. Kernels stand between LOWBIT_BEGIN(layer) and LOWBIT_END:
// compiled for the unit's instruction set, in a namespace of the layer, with internal linkage, so that the linker never
// takes one unit's copy of a function for another's. Layers: `base` (every unit), `vnni` (AVX512-VNNI and better), `gemm`
// (BF16 and AMX). A header that is opened alone is compiled for the best instruction set the compiler knows.
#ifndef LOWBIT_NATIVE_TARGET_H
#define LOWBIT_NATIVE_TARGET_H

#include "common.h"

#define LOWBIT_TARGET_GENERIC 0
#define LOWBIT_TARGET_AVX2 1
#define LOWBIT_TARGET_AVX512 2
#define LOWBIT_TARGET_AVX512_VNNI 3
#define LOWBIT_TARGET_AVX512_BF16 4
#define LOWBIT_TARGET_AMX 5

#ifndef LOWBIT_TARGET
#if defined(LOWBIT_HAVE_AMX)
#define LOWBIT_TARGET LOWBIT_TARGET_AMX
#elif defined(LOWBIT_HAVE_BF16)
#define LOWBIT_TARGET LOWBIT_TARGET_AVX512_BF16
#elif defined(LOWBIT_HAVE_X86)
#define LOWBIT_TARGET LOWBIT_TARGET_AVX512_VNNI
#else
#define LOWBIT_TARGET LOWBIT_TARGET_GENERIC
#endif
#endif

// What kernels ask.
#if LOWBIT_TARGET >= LOWBIT_TARGET_AVX512
#define LOWBIT_AVX512 1
#elif LOWBIT_TARGET == LOWBIT_TARGET_AVX2
#define LOWBIT_AVX2 1
#endif
#if LOWBIT_TARGET == LOWBIT_TARGET_AMX
#define LOWBIT_TILES 1
#endif

#define LOWBIT_AVX512_FEATURES "avx512f,avx512bw,avx512vl,avx512dq"
#define LOWBIT_BF16_FEATURES LOWBIT_AVX512_FEATURES ",avx512vnni,avx512vbmi,avx512bf16"

#if LOWBIT_TARGET == LOWBIT_TARGET_AVX2 || (defined(LOWBIT_EMULATE) && defined(LOWBIT_AVX512))
#define LOWBIT_FEATURES "avx2,fma,f16c"
#elif LOWBIT_TARGET == LOWBIT_TARGET_AVX512
#define LOWBIT_FEATURES LOWBIT_AVX512_FEATURES
#elif LOWBIT_TARGET == LOWBIT_TARGET_AVX512_VNNI
#define LOWBIT_FEATURES LOWBIT_AVX512_FEATURES ",avx512vnni"
#elif LOWBIT_TARGET == LOWBIT_TARGET_AVX512_BF16
#define LOWBIT_FEATURES LOWBIT_BF16_FEATURES
#elif LOWBIT_TARGET == LOWBIT_TARGET_AMX
#define LOWBIT_FEATURES LOWBIT_BF16_FEATURES ",amx-tile,amx-int8,amx-bf16"
#endif

#define LOWBIT_PRAGMA(text) _Pragma(#text)
#if !defined(LOWBIT_FEATURES)
#define LOWBIT_PUSH_TARGET
#define LOWBIT_POP_TARGET
#elif defined(__clang__)
#define LOWBIT_PUSH_TARGET_(features) LOWBIT_PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define LOWBIT_PUSH_TARGET LOWBIT_PUSH_TARGET_(LOWBIT_FEATURES)
#define LOWBIT_POP_TARGET LOWBIT_PRAGMA(clang attribute pop)
#else
#if defined(LOWBIT_AVX512) && !defined(LOWBIT_EMULATE)
#define LOWBIT_WIDTH ",prefer-vector-width=512"
#else
#define LOWBIT_WIDTH
#endif
#define LOWBIT_PUSH_TARGET_(features) LOWBIT_PRAGMA(GCC push_options) LOWBIT_PRAGMA(GCC target(features))
#define LOWBIT_PUSH_TARGET LOWBIT_PUSH_TARGET_(LOWBIT_FEATURES LOWBIT_WIDTH)
#define LOWBIT_POP_TARGET LOWBIT_PRAGMA(GCC pop_options)
#endif

#define LOWBIT_BEGIN(layer) \
    LOWBIT_PUSH_TARGET      \
    namespace lowbit {      \
    namespace {             \
    namespace layer {
#define LOWBIT_END \
    }              \
    }              \
    }              \
    LOWBIT_POP_TARGET

#endif  // LOWBIT_NATIVE_TARGET_H
