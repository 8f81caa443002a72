#define LOWBIT_TARGET LOWBIT_TARGET_AVX2

#include "../common.h"

#ifdef LOWBIT_HAVE_X86
#include "../kernels/base_kernels.h"

namespace lowbit {

const BaseKernels* avx2_kernels() { return &base::kernels; }

}  // namespace lowbit
#else
#include "../kernel_set.h"

namespace lowbit {

const BaseKernels* avx2_kernels() { return nullptr; }

}  // namespace lowbit
#endif
