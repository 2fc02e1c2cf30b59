// Cotangent of a stage's velocity, meaning as in rampde.eager.adjoint_stage.

#include "../boxing.h"
#include "../leaves.h"
#include "../scale_state.h"
#include "sum.cuh"

namespace rampde::cuda {
namespace {

template <class Accumulator, class Term>
__device__ void form_cotangent(const Sum& sum, double b, const float* scale_state,
                               const Blocks& blocks) {
  __shared__ Accumulator weights[kMaxTerms];
  set_weights(weights, sum, read_scalar(sum.h, sum.h_dtype));
  const double scale = scale_state == nullptr ? 1.0 : scale_state[kScale];
  const auto factor = static_cast<Accumulator>(b * scale);
  for_each_vector(0, sum.numel, sum.aligned, int64_t{blocks.index} * kThreads + threadIdx.x,
                  int64_t{blocks.count} * kThreads, [&]<int kCount>(int64_t i) {
                    Accumulator sums[kCount] = {};
                    if (b != 0.0) add_scaled(sums, factor, sum.base, sum.base_dtype, i);
                    add_terms<kCount, Term>(sums, sum, weights, i);
                    store(sum.result, sum.result_dtype, i, sums);
                  });
}

template <class Accumulator, class Term>
__global__ void __launch_bounds__(kThreads)
    adjoint_stage_kernel(const __grid_constant__ Sum sum, double b, const float* scale_state) {
  form_cotangent<Accumulator, Term>(sum, b, scale_state,
                                    {static_cast<int>(blockIdx.x), static_cast<int>(gridDim.x)});
}

template <class Accumulator>
__global__ void __launch_bounds__(kThreads, kLeafBlocks)
    adjoint_stage_leaves_kernel(const __grid_constant__ LeafSums list, double b,
                                const float* scale_state) {
  __shared__ Sum sum;
  const int leaf = list.blocks.find(blockIdx.x);
  list.copy_sum(leaf, sum);
  form_cotangent<Accumulator, Mixed>(sum, b, scale_state, list.blocks.of_leaf(leaf, blockIdx.x));
}

// The sum that `result` receives, of `adjoint` and the `vjps` with the coefficients `a`.
Sum read_sum(const char* op, const Tensor& adjoint, const TensorList& vjps, const Operand& step,
             double b, const std::vector<double>& a, const Output& result, Terms& terms) {
  const DType state_dtype = check_state({op, "adjoint"}, adjoint);
  read_terms(terms, {op, "vjps"}, vjps, "a", a, "adjoint", adjoint);
  const Operand base{b != 0.0 ? adjoint.data() : nullptr, state_dtype};
  return make_sum(base, terms, std::nullopt, result, step, adjoint.numel());
}

Tensor adjoint_stage(const Tensor& adjoint, const TensorList& vjps, const Tensor& h,
                     const double& b, const std::vector<double>& a, const DTypeArgument& dtype,
                     const std::optional<Tensor>& scale_state) {
  constexpr const char* op = "adjoint_stage";
  const Launcher launch(op, adjoint);
  const DType state_dtype = check_state({op, "adjoint"}, adjoint);
  const Operand step = read_step_size(op, h, "adjoint", adjoint);
  const DType result_dtype = check_floating({op, "the result"}, dtype.number);
  const float* scaling =
      scale_state ? read_scale_state(op, *scale_state, "adjoint", adjoint) : nullptr;

  Tensor result = adjoint.empty_like(dtype.number);
  Terms terms;
  const Sum sum =
      read_sum(op, adjoint, vjps, step, b, a, {result.mutable_data(), result_dtype}, terms);
  with_sum_types(state_dtype, terms, [&]<class Accumulator, class Term>() {
    launch(adjoint_stage_kernel<Accumulator, Term>, blocks_for(sum.numel), kThreads, sum, b,
           scaling);
  });
  return result;
}

TensorList adjoint_stage_leaves(const TensorList& adjoint, OptionalTensorList& vjps,
                                const Tensor& h, const double& b, const std::vector<double>& a,
                                const std::vector<int64_t>& dtypes,
                                const std::optional<Tensor>& scale_state) {
  constexpr const char* op = "adjoint_stage_leaves";
  check_leaf_products(op, vjps, a, adjoint.size());
  const auto numbers = read_dtypes(op, dtypes, adjoint.size());
  TensorList results;
  if (adjoint.empty()) return results;
  const Launcher launch(op, adjoint[0]);
  const Operand step = read_step_size(op, h, "adjoint[0]", adjoint[0]);
  const float* scaling =
      scale_state ? read_scale_state(op, *scale_state, "adjoint[0]", adjoint[0]) : nullptr;
  const auto launch_leaves = [&]<class Accumulator>(const LeafSums& list, Accumulator) {
    launch(adjoint_stage_leaves_kernel<Accumulator>, list.blocks.total(), kThreads, list, b,
           scaling);
  };
  LeafBatches batches(launch_leaves);
  // copies of operands live until the last launch that reads them
  std::vector<Terms> terms(adjoint.size());
  std::vector<TensorList> present(adjoint.size());
  results.reserve(adjoint.size());
  for (size_t i = 0; i < adjoint.size(); ++i) {
    check_device({op, "adjoint", static_cast<int64_t>(i)}, adjoint[i], "adjoint[0]", adjoint[0]);
    std::vector<double> weights = a;
    present[i] = take_present(vjps, i, a.size(), &weights);
    results.push_back(adjoint[i].empty_like(numbers[i].number));
    const Output result{results[i].mutable_data(), results[i].dtype()};
    batches.add(read_sum(op, adjoint[i], present[i], step, b, weights, result, terms[i]));
  }
  batches.flush();
  return results;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rampde, CUDA, m) {
  m.impl("adjoint_stage", boxed<&adjoint_stage>);
  m.impl("adjoint_stage_leaves", boxed<&adjoint_stage_leaves>);
}

}  // namespace rampde::cuda
