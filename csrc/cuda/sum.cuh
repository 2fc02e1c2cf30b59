// The fused sum of adjoint_stage and adjoint_update: base, terms of any dtypes, result.

#pragma once

#include "../operands.h"
#include "chunks.h"
#include "launch.h"
#include "vectors.cuh"

namespace rampde::cuda {

// Passed to kernels by value; h and the scale stay on the device.
struct Sum {
  Terms::Term term[kMaxTerms];
  const void* base;
  const void* extra;  // null, or a last term with the factor 1
  void* result;
  const void* h;
  int64_t numel;
  int count;
  DType base_dtype;
  DType extra_dtype;
  DType result_dtype;
  DType h_dtype;
  bool aligned;
};

inline Sum make_sum(const Operand& base, const Terms& terms, const std::optional<Operand>& extra,
                    const Output& result, const Operand& h, int64_t numel) {
  Sum sum{};
  sum.aligned = is_aligned(base.data) && is_aligned(result.data);
  sum.base = base.data;
  sum.base_dtype = base.dtype;
  sum.result = result.data;
  sum.result_dtype = result.dtype;
  sum.h = h.data;
  sum.h_dtype = h.dtype;
  sum.numel = numel;
  sum.count = terms.count;
  for (int j = 0; j < terms.count; ++j) {
    sum.term[j] = terms.term[j];
    sum.aligned = sum.aligned && is_aligned(sum.term[j].data);
  }
  if (extra) {
    sum.extra = extra->data;
    sum.extra_dtype = extra->dtype;
    sum.aligned = sum.aligned && is_aligned(extra->data);
  }
  return sum;
}

__device__ inline double read_scalar(const void* data, DType dtype) {
  return dtype == DType::Float64 ? *static_cast<const double*>(data)
                                 : static_cast<double>(*static_cast<const float*>(data));
}

// Forms `factor * coefficient` of all terms in double, once for the block.
template <class Accumulator>
__device__ void set_weights(Accumulator* weights, const Sum& sum, double factor) {
  if (threadIdx.x < sum.count) {
    weights[threadIdx.x] = static_cast<Accumulator>(factor * sum.term[threadIdx.x].coefficient);
  }
  __syncthreads();
}

// Adds the terms, all of type Term: several loads are under way before the first is needed.
template <int kCount, class Term, class Accumulator>
__device__ void add_uniform_terms(Accumulator (&sums)[kCount], const Sum& sum,
                                  const Accumulator* weights, int64_t index) {
  constexpr int kAtOnce = 4;
  for (int first = 0; first < sum.count; first += kAtOnce) {
    Pack<Term, kCount> packs[kAtOnce];
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      if (first + j < sum.count) packs[j] = read<kCount, Term>(sum.term[first + j].data, index);
    }
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      if (first + j < sum.count) add_scaled(sums, weights[first + j], packs[j]);
    }
  }
}

// the type of terms whose dtypes differ
struct Mixed {};

template <int kCount, class Term, class Accumulator>
__device__ void add_terms(Accumulator (&sums)[kCount], const Sum& sum, const Accumulator* weights,
                          int64_t index) {
  if constexpr (std::is_same_v<Term, Mixed>) {
    for (int j = 0; j < sum.count; ++j) {
      add_scaled(sums, weights[j], sum.term[j].data, sum.term[j].dtype, index);
    }
  } else {
    add_uniform_terms<kCount, Term>(sums, sum, weights, index);
  }
}

// Calls `function.template operator()<Accumulator, Term>()`: kernels of their own for the usual
// dtypes, float sums of terms of one dtype, and Mixed for the rest.
template <class Function>
void with_sum_types(DType state, const Terms& terms, const Function& function) {
  if (state == DType::Float64) return function.template operator()<double, Mixed>();
  const DType first = terms.count > 0 ? terms.term[0].dtype : DType::Float32;
  for (int j = 1; j < terms.count; ++j) {
    if (terms.term[j].dtype != first) return function.template operator()<float, Mixed>();
  }
  switch (first) {
    case DType::Float32:
      return function.template operator()<float, float>();
    case DType::Float16:
      return function.template operator()<float, __half>();
    case DType::BFloat16:
      return function.template operator()<float, __nv_bfloat16>();
    default:
      return function.template operator()<float, Mixed>();
  }
}

inline int64_t blocks_for(int64_t numel) {
  constexpr int64_t per_block = int64_t{kThreads} * kVector;
  const int64_t blocks = (numel + per_block - 1) / per_block;
  return blocks < kMaxBlocks ? blocks : kMaxBlocks;
}

// blocks of a multiprocessor for which a kernel of leaves may take registers; where nothing is said
// it spills some, to make room for one block more
inline constexpr int kLeafBlocks = 4;

// The sums of several leaves of a state: they fit the 4 KiB of arguments that every CUDA version
// passes to a kernel.
struct LeafSums {
  Sum sum[kLeaves];
  LeafBlocks blocks;

  // Copies the sum of a leaf to shared memory, where its members have addresses known beforehand:
  // those in an argument at an index that is not would take registers.
  __device__ void copy_sum(int leaf, Sum& shared) const {
    static_assert(sizeof(Sum) % sizeof(uint64_t) == 0);
    const auto* source = reinterpret_cast<const uint64_t*>(&sum[leaf]);
    if (threadIdx.x < sizeof(Sum) / sizeof(uint64_t)) {
      reinterpret_cast<uint64_t*>(&shared)[threadIdx.x] = source[threadIdx.x];
    }
    __syncthreads();
  }
};
static_assert(sizeof(LeafSums) + 2 * sizeof(void*) <= 4096);

// Gathers leaves for `launch(list, accumulator)`, eight at a time, those whose sums are formed in
// double apart. The kernels take terms of any dtypes, as Mixed: what one that knew the usual ones
// has in flight, this one has in more blocks at a time, for which it leaves the registers.
template <class Launch>
class LeafBatches {
 public:
  explicit LeafBatches(const Launch& launch) : launch_(launch) {}

  void add(const Sum& sum) {
    LeafSums& list = accumulation_dtype(sum.base_dtype) == DType::Float64 ? of_double_ : of_float_;
    list.sum[list.blocks.add(blocks_for(sum.numel))] = sum;
    if (list.blocks.full()) flush();
  }
  void flush() {
    launch_(of_float_, float{});
    launch_(of_double_, double{});
    of_float_.blocks.leaves = of_double_.blocks.leaves = 0;
  }

 private:
  const Launch& launch_;
  LeafSums of_float_, of_double_;
};

}  // namespace rampde::cuda
