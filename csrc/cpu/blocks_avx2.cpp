// The block kernels for processors with AVX2.

#if defined(__x86_64__) && defined(__GNUC__)

#include <immintrin.h>

#include <cstdint>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif

#define RAMPDE_F16C
#include "blocks_impl.h"

namespace rampde::cpu {

constexpr Kernels kAvx2Kernels = all_kernels();

}  // namespace rampde::cpu

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif
