#define LOWBIT_TARGET LOWBIT_TARGET_GENERIC

#include "../common.h"

#include "../kernels/base_kernels.h"

namespace lowbit {

const BaseKernels* generic_kernels() { return &base::kernels; }

}  // namespace lowbit
