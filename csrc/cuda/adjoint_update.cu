// End of a step backwards, meaning as in rampde.eager.adjoint_update. Where not all of the result
// is finite, MAXIMUM keeps the finite part's maximum, which update_scale then discards.

#include "../boxing.h"
#include "../scale_state.h"
#include "sum.cuh"

namespace rampde::cuda {
namespace {

// Notes what the block's sums were like. The bits of floats that are not negative are ordered as
// the floats, and neither a maximum nor a flag depends on the order of the blocks.
__device__ void note_largest(float* scale_state, float largest, bool finite) {
  __shared__ int block_bits;
  if (threadIdx.x == 0) block_bits = 0;
  const bool all_finite = __syncthreads_and(finite);
  int bits = __float_as_int(largest);
  for (int distance = 16; distance > 0; distance /= 2) {
    bits = max(bits, __shfl_xor_sync(0xffffffff, bits, distance));
  }
  if (threadIdx.x % 32 == 0) atomicMax(&block_bits, bits);
  __syncthreads();
  if (threadIdx.x != 0) return;
  if (all_finite) {
    atomicMax(reinterpret_cast<int*>(scale_state + kMaximum), block_bits);
  } else {
    scale_state[kFinite] = 0.0f;
  }
}

template <class Accumulator, class Term>
__global__ void __launch_bounds__(kThreads)
    adjoint_update_kernel(const __grid_constant__ Sum sum, float* scale_state) {
  if (scale_state != nullptr && scale_state[kOverflowed] != 0.0f) return;
  __shared__ Accumulator weights[kMaxTerms];
  const double scale = scale_state == nullptr ? 1.0 : scale_state[kScale];
  set_weights(weights, sum, read_scalar(sum.h, sum.h_dtype) / scale);
  float largest = 0.0f;
  bool finite = true;
  const int64_t thread = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  for_each_vector(0, sum.numel, sum.aligned, thread, int64_t{gridDim.x} * kThreads,
                  [&]<int kCount>(int64_t i) {
                    constexpr auto kOne = static_cast<Accumulator>(1);
                    Accumulator sums[kCount];
#pragma unroll
                    for (Accumulator& sum_of : sums) sum_of = Accumulator{-0.0};
                    // the terms first: what is accumulated is rounded once in a step
                    add_terms<kCount, Term>(sums, sum, weights, i);
                    add_scaled(sums, kOne, sum.base, sum.base_dtype, i);
                    if (sum.extra != nullptr) {
                      add_scaled(sums, kOne, sum.extra, sum.extra_dtype, i);
                    }
                    store(sum.result, sum.result_dtype, i, sums);
#pragma unroll
                    for (int j = 0; j < kCount; ++j) {
                      finite = finite && isfinite(sums[j]);
                      largest = fmaxf(largest, static_cast<float>(fabs(sums[j])));
                    }
                  });
  if (scale_state != nullptr) note_largest(scale_state, largest, finite);
}

void adjoint_update(const Tensor& adjoint, const TensorList& vjps, const Tensor& h,
                    const std::optional<Tensor>& cotangent, const Tensor& adjoint_next,
                    const std::optional<Tensor>& scale_state) {
  constexpr const char* op = "adjoint_update";
  const Launcher launch(op, adjoint);
  const DType state_dtype = check_state({op, "adjoint"}, adjoint);
  Terms terms;
  read_terms(terms, {op, "vjps"}, vjps, "adjoint", adjoint, [](size_t) { return 1.0; });
  const Operand step = read_step_size(op, h, "adjoint", adjoint);
  const Output next = write_operand({op, "adjoint_next"}, adjoint_next, "adjoint", adjoint);
  std::optional<Operand> loss;
  if (cotangent) {
    loss = read_operand({op, "cotangent"}, *cotangent, "adjoint", adjoint, terms.copies);
  }
  float* scaling = scale_state ? write_scale_state(op, *scale_state, "adjoint", adjoint) : nullptr;

  const Sum sum = make_sum({adjoint.data(), state_dtype}, terms, loss, next, step, adjoint.numel());
  with_sum_types(state_dtype, terms, [&]<class Accumulator, class Term>() {
    launch(adjoint_update_kernel<Accumulator, Term>, blocks_for(sum.numel), kThreads, sum, scaling);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rampde, CUDA, m) { m.impl("adjoint_update", boxed<&adjoint_update>); }

}  // namespace rampde::cuda
