// Chooses the block kernels, once.

#include <cstdlib>
#include <cstring>

#include "blocks.h"

namespace rampde::cpu {
namespace {

const Kernels& select() {
#if defined(__x86_64__) && defined(__GNUC__)
  // PyTorch's own variable, so that one setting lowers both; useful to reproduce another machine
  const char* limit = std::getenv("ATEN_CPU_CAPABILITY");
  const bool baseline_wanted = limit != nullptr && std::strcmp(limit, "default") == 0;
  const bool avx2_wanted = limit != nullptr && std::strcmp(limit, "avx2") == 0;
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
  if (avx512 && !avx2_wanted && !baseline_wanted) return kAvx512Kernels;
  if (avx2 && !baseline_wanted) return kAvx2Kernels;
#endif
  return kBaselineKernels;
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& selected = select();
  return selected;
}

}  // namespace rampde::cpu
