// Kernels on blocks of memory small enough for the first-level cache, compiled once for each
// instruction set and chosen at run time.

#pragma once

#include <cstdint>

namespace rampde::cpu {

// elements of a block: 8 KiB of float64 sums leave room for the operand in 32 KiB of cache
inline constexpr int64_t kBlock = 1024;

// Sums in Accumulator, float or double; arrays of functions are indexed by DType.
template <class Accumulator>
struct SumKernels {
  // sums[i] = x[i]
  void (*load[4])(Accumulator* sums, const void* x, int64_t count);
  // sums[i] += factor * x[i]
  void (*add_scaled[4])(Accumulator* sums, const void* x, Accumulator factor, int64_t count);
  // x[i] = sums[i], rounded to nearest even
  void (*store[4])(void* x, const Accumulator* sums, int64_t count);
  // base[i] + increment[i] = exactly base[i] + increment[i] before: the sum and its rounding error
  void (*two_sum)(Accumulator* base, Accumulator* increment, int64_t count);
};

struct Kernels {
  SumKernels<float> in_float;
  SumKernels<double> in_double;
  // max |x[i]| as the bits of its dtype, in whose order NaN is above infinity
  uint64_t (*largest[4])(const void* x, int64_t count);
};

extern const Kernels kBaselineKernels;
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;

// those of the best instruction set that this processor has, unless ATEN_CPU_CAPABILITY lowers it
const Kernels& kernels();

}  // namespace rampde::cpu
