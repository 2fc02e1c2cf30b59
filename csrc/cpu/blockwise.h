// What the CPU operators share: a loop over blocks, threaded where that pays, and the fused sum.

#pragma once

#include <algorithm>
#include <atomic>

#include "../operands.h"
#include "blocks.h"

namespace rampde::cpu {

// elements below which a second thread costs more than it saves, as in ATen's own loops
inline constexpr int64_t kGrain = 32768;

// Calls `body(piece)` for all pieces, of about kBlock elements each, in any order and on any
// thread.
template <class Body>
void for_each_piece(int64_t pieces, const Body& body) {
  constexpr int64_t grain = kGrain / kBlock;
  const auto range = [](int64_t first, int64_t last, void* context) {
    for (int64_t piece = first; piece < last; ++piece) (*static_cast<const Body*>(context))(piece);
  };
  void* context = const_cast<Body*>(&body);
  if (pieces <= grain) return range(0, pieces, context);
  check_shim(torch_parallel_for(0, pieces, grain, range, context), "run a loop in parallel");
}

// Calls `body(begin, count)` for all blocks of `numel` elements, in any order and on any thread.
template <class Body>
void for_each_block(int64_t numel, const Body& body) {
  for_each_piece((numel + kBlock - 1) / kBlock, [&](int64_t piece) {
    const int64_t begin = piece * kBlock;
    body(begin, begin + kBlock < numel ? kBlock : numel - begin);
  });
}

inline const void* at(const void* data, DType dtype, int64_t index) {
  return static_cast<const char*>(data) + index * element_size(dtype);
}
inline const void* at(const Operand& x, int64_t index) { return at(x.data, x.dtype, index); }
inline void* at(const Output& x, int64_t index) {
  return static_cast<char*>(x.data) + index * element_size(x.dtype);
}

template <class Accumulator>
const SumKernels<Accumulator>& sum_kernels() {
  if constexpr (std::is_same_v<Accumulator, double>) {
    return kernels().in_double;
  } else {
    return kernels().in_float;
  }
}

// Calls `function.template operator()<Accumulator>()` with the type in which sums are formed.
template <class Function>
decltype(auto) with_accumulator(DType dtype, const Function& function) {
  if (accumulation_dtype(dtype) == DType::Float64) return function.template operator()<double>();
  return function.template operator()<float>();
}

template <class Accumulator>
void load(Accumulator* sums, const Operand& x, int64_t begin, int64_t count) {
  sum_kernels<Accumulator>().load[static_cast<int>(x.dtype)](sums, at(x, begin), count);
}

template <class Accumulator>
void add_scaled(Accumulator* sums, const Operand& x, double factor, int64_t begin, int64_t count) {
  sum_kernels<Accumulator>().add_scaled[static_cast<int>(x.dtype)](
      sums, at(x, begin), static_cast<Accumulator>(factor), count);
}

template <class Accumulator>
void store(const Output& x, const Accumulator* sums, int64_t begin, int64_t count) {
  sum_kernels<Accumulator>().store[static_cast<int>(x.dtype)](at(x, begin), sums, count);
}

// `sums[i] += factor * coefficient_j * term_j[begin + i]` for all terms, the factor formed in
// double
template <class Accumulator>
void add_terms(Accumulator* sums, const Terms& terms, double factor, int64_t begin, int64_t count) {
  for (int j = 0; j < terms.count; ++j) {
    const Terms::Term& term = terms.term[j];
    add_scaled(sums, Operand{term.data, term.dtype}, factor * term.coefficient, begin, count);
  }
}

// `total = factor * sum_j coefficient_j * term_j`
template <class Accumulator>
void sum_terms(Accumulator* total, const Terms& terms, double factor, int64_t begin,
               int64_t count) {
  // minus zero is what added to anything leaves it as it is
  std::fill_n(total, count, Accumulator{-0.0});
  add_terms(total, terms, factor, begin, count);
}

// `total = base + factor * sum_j coefficient_j * term_j`, the terms summed first: what is
// accumulated from step to step is rounded once in a step
template <class Accumulator>
void advance(Accumulator* total, const Operand& base, const Terms& terms, double factor,
             int64_t begin, int64_t count) {
  sum_terms(total, terms, factor, begin, count);
  add_scaled(total, base, 1.0, begin, count);
}

inline double read_scalar(const Operand& x) {
  return x.dtype == DType::Float64 ? *static_cast<const double*>(x.data)
                                   : static_cast<double>(*static_cast<const float*>(x.data));
}

// bits of infinity, above which there is only NaN
inline uint64_t infinity_bits(DType dtype) {
  constexpr uint64_t bits[kDTypes] = {0x7ff0000000000000, 0x7f800000, 0x7c00, 0x7f80};
  return bits[static_cast<int>(dtype)];
}

inline uint64_t largest(const void* x, DType dtype, int64_t count) {
  return kernels().largest[static_cast<int>(dtype)](x, count);
}

inline bool all_finite(const void* x, DType dtype, int64_t count) {
  return largest(x, dtype, count) < infinity_bits(dtype);
}

}  // namespace rampde::cpu
