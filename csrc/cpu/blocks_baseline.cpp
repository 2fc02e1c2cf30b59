// The block kernels for any processor.

#include "blocks_impl.h"

namespace rampde::cpu {

constexpr Kernels kBaselineKernels = all_kernels();

}  // namespace rampde::cpu
