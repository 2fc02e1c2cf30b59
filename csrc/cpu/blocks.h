// Kernels on blocks of memory small enough for the first-level cache, compiled once for each
// instruction set and chosen at run time.

#pragma once

#include <cstdint>

namespace rampde::cpu {

// elements of a block: 8 KiB of float64 sums leave room for the operand in 32 KiB of cache
inline constexpr int64_t kBlock = 1024;

// elements, consecutive in memory, that share a scale of a step in 8 bits
inline constexpr int64_t kScaleBlock = 128;

// Sums in Accumulator, float or double; arrays of functions are indexed by DType.
template <class Accumulator>
struct SumKernels {
  // sums[i] = x[i]
  void (*load[4])(Accumulator* sums, const void* x, int64_t count);
  // sums[i] += factor * x[i]
  void (*add_scaled[4])(Accumulator* sums, const void* x, Accumulator factor, int64_t count);
  // sums[i] += codes[i] * scales[i / kScaleBlock], both as in rampde.fp8_blocks
  void (*add_quantised)(Accumulator* sums, const void* codes, const float* scales, int64_t count);
  // x[i] = sums[i], rounded to nearest even
  void (*store[4])(void* x, const Accumulator* sums, int64_t count);
  // base[i] + increment[i] = exactly base[i] + increment[i] before: the sum and its rounding error
  void (*two_sum)(Accumulator* base, Accumulator* increment, int64_t count);
  // y[i] = 1 / (atol + rtol * max(|y[i]|, |next[i]|)), the weight of an error, and the ratios
  // start: zero, or NaN where next[i] is not finite
  void (*weigh)(Accumulator* y, Accumulator* ratios, const Accumulator* next, Accumulator rtol,
                Accumulator atol, int64_t count);
  // with part = factor * x[i] * weights[i]: ratios[i] += part and shares[i] += part^2
  void (*add_error[4])(Accumulator* ratios, Accumulator* shares, const Accumulator* weights,
                       const void* x, Accumulator factor, int64_t count);
  // squares[i] = x[i]^2, which has no room in a float
  void (*square)(double* squares, const Accumulator* x, int64_t count);
  // finite[i] = x[i] where that is finite, else 0
  void (*load_finite)(double* finite, const Accumulator* x, int64_t count);
};

struct Kernels {
  SumKernels<float> in_float;
  SumKernels<double> in_double;
  // max |x[i]| as the bits of its dtype, in whose order NaN is above infinity
  uint64_t (*largest[4])(const void* x, int64_t count);
  // sums[2 * r] = the sum over row r of x, of shape [rows, length], in one order on every
  // processor; x is used up
  void (*sum_rows)(double* sums, double* x, int64_t rows, int64_t length);
  // the scales of -x, and its codes rounded to nearest even
  void (*quantise_negated)(void* codes, float* scales, const float* x, int64_t count);
  // rounded at random; x begins at offset `begin` of its tensor, a multiple of kBlock
  void (*quantise_negated_randomly)(void* codes, float* scales, const float* x, int64_t seed,
                                    int64_t begin, int64_t count);
};

extern const Kernels kBaselineKernels;
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;

// those of the best instruction set that this processor has, unless ATEN_CPU_CAPABILITY lowers it
const Kernels& kernels();

}  // namespace rampde::cpu
