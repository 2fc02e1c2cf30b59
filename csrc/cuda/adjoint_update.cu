// End of a step backwards, meaning as in rampde.eager.adjoint_update. Where not all of the result
// is finite, MAXIMUM keeps the finite part's maximum, which update_scale then discards.

#include "../boxing.h"
#include "../leaves.h"
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
__device__ void take_step_backwards(const Sum& sum, float* scale_state, const Blocks& blocks) {
  if (scale_state != nullptr && scale_state[kOverflowed] != 0.0f) return;
  __shared__ Accumulator weights[kMaxTerms];
  const double scale = scale_state == nullptr ? 1.0 : scale_state[kScale];
  set_weights(weights, sum, read_scalar(sum.h, sum.h_dtype) / scale);
  float largest = 0.0f;
  bool finite = true;
  for_each_vector(0, sum.numel, sum.aligned, int64_t{blocks.index} * kThreads + threadIdx.x,
                  int64_t{blocks.count} * kThreads, [&]<int kCount>(int64_t i) {
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

template <class Accumulator, class Term>
__global__ void __launch_bounds__(kThreads)
    adjoint_update_kernel(const __grid_constant__ Sum sum, float* scale_state) {
  take_step_backwards<Accumulator, Term>(
      sum, scale_state, {static_cast<int>(blockIdx.x), static_cast<int>(gridDim.x)});
}

template <class Accumulator>
__global__ void __launch_bounds__(kThreads, kLeafBlocks)
    adjoint_update_leaves_kernel(const __grid_constant__ LeafSums list, float* scale_state) {
  __shared__ Sum sum;
  const int leaf = list.blocks.find(blockIdx.x);
  list.copy_sum(leaf, sum);
  take_step_backwards<Accumulator, Mixed>(sum, scale_state, list.blocks.of_leaf(leaf, blockIdx.x));
}

Sum read_sum(const char* op, const Tensor& adjoint, const TensorList& vjps, const Operand& step,
             const std::optional<Tensor>& cotangent, const Tensor& adjoint_next, Terms& terms) {
  const DType state_dtype = check_state({op, "adjoint"}, adjoint);
  read_terms(terms, {op, "vjps"}, vjps, "adjoint", adjoint, [](size_t) { return 1.0; });
  const Output next = write_operand({op, "adjoint_next"}, adjoint_next, "adjoint", adjoint);
  std::optional<Operand> loss;
  if (cotangent) {
    loss = read_operand({op, "cotangent"}, *cotangent, "adjoint", adjoint, terms.copies);
  }
  return make_sum({adjoint.data(), state_dtype}, terms, loss, next, step, adjoint.numel());
}

void adjoint_update(const Tensor& adjoint, const TensorList& vjps, const Tensor& h,
                    const std::optional<Tensor>& cotangent, const Tensor& adjoint_next,
                    const std::optional<Tensor>& scale_state) {
  constexpr const char* op = "adjoint_update";
  const Launcher launch(op, adjoint);
  const Operand step = read_step_size(op, h, "adjoint", adjoint);
  Terms terms;
  const Sum sum = read_sum(op, adjoint, vjps, step, cotangent, adjoint_next, terms);
  float* scaling = scale_state ? write_scale_state(op, *scale_state, "adjoint", adjoint) : nullptr;
  with_sum_types(adjoint.dtype(), terms, [&]<class Accumulator, class Term>() {
    launch(adjoint_update_kernel<Accumulator, Term>, blocks_for(sum.numel), kThreads, sum, scaling);
  });
}

void adjoint_update_leaves(const TensorList& adjoint, OptionalTensorList& vjps, const Tensor& h,
                           const OptionalTensorList& cotangents, const TensorList& adjoint_next,
                           const std::optional<Tensor>& scale_state) {
  constexpr const char* op = "adjoint_update_leaves";
  const size_t count = count_of_leaf({op, "vjps"}, vjps, adjoint.size());
  check_one_of_leaf({op, "cotangents"}, cotangents, adjoint.size());
  check_one_of_leaf({op, "adjoint_next"}, adjoint_next, adjoint.size());
  if (adjoint.empty()) return;
  const Launcher launch(op, adjoint[0]);
  const Operand step = read_step_size(op, h, "adjoint[0]", adjoint[0]);
  float* scaling =
      scale_state ? write_scale_state(op, *scale_state, "adjoint[0]", adjoint[0]) : nullptr;
  const auto launch_leaves = [&]<class Accumulator>(const LeafSums& list, Accumulator) {
    launch(adjoint_update_leaves_kernel<Accumulator>, list.blocks.total(), kThreads, list, scaling);
  };
  LeafBatches batches(launch_leaves);
  std::vector<Terms> terms(adjoint.size());
  std::vector<TensorList> present(adjoint.size());
  for (size_t i = 0; i < adjoint.size(); ++i) {
    check_device({op, "adjoint", static_cast<int64_t>(i)}, adjoint[i], "adjoint[0]", adjoint[0]);
    present[i] = take_present(vjps, i, count);
    const Sum sum =
        read_sum(op, adjoint[i], present[i], step, cotangents[i], adjoint_next[i], terms[i]);
    batches.add(sum);
  }
  batches.flush();
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rampde, CUDA, m) {
  m.impl("adjoint_update", boxed<&adjoint_update>);
  m.impl("adjoint_update_leaves", boxed<&adjoint_update_leaves>);
}

}  // namespace rampde::cuda
