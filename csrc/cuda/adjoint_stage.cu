// Cotangent of a stage's velocity, meaning as in rampde.eager.adjoint_stage.

#include "../boxing.h"
#include "../scale_state.h"
#include "sum.cuh"

namespace rampde::cuda {
namespace {

template <class Accumulator, class Term>
__global__ void __launch_bounds__(kThreads)
    adjoint_stage_kernel(const __grid_constant__ Sum sum, double b, const float* scale_state) {
  __shared__ Accumulator weights[kMaxTerms];
  set_weights(weights, sum, read_scalar(sum.h, sum.h_dtype));
  const double scale = scale_state == nullptr ? 1.0 : scale_state[kScale];
  const auto factor = static_cast<Accumulator>(b * scale);
  const int64_t thread = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  for_each_vector(0, sum.numel, sum.aligned, thread, int64_t{gridDim.x} * kThreads,
                  [&]<int kCount>(int64_t i) {
                    Accumulator sums[kCount] = {};
                    if (b != 0.0) add_scaled(sums, factor, sum.base, sum.base_dtype, i);
                    add_terms<kCount, Term>(sums, sum, weights, i);
                    store(sum.result, sum.result_dtype, i, sums);
                  });
}

Tensor adjoint_stage(const Tensor& adjoint, const TensorList& vjps, const Tensor& h,
                     const double& b, const std::vector<double>& a, const DTypeArgument& dtype,
                     const std::optional<Tensor>& scale_state) {
  constexpr const char* op = "adjoint_stage";
  const Launcher launch(op, adjoint);
  const DType state_dtype = check_state({op, "adjoint"}, adjoint);
  Terms terms;
  read_terms(terms, {op, "vjps"}, vjps, "a", a, "adjoint", adjoint);
  const Operand step = read_step_size(op, h, "adjoint", adjoint);
  const DType result_dtype = check_floating({op, "the result"}, dtype.number);
  const float* scaling =
      scale_state ? read_scale_state(op, *scale_state, "adjoint", adjoint) : nullptr;

  Tensor result = adjoint.empty_like(dtype.number);
  const Operand base{b != 0.0 ? adjoint.data() : nullptr, state_dtype};
  const Sum sum = make_sum(base, terms, std::nullopt, {result.mutable_data(), result_dtype}, step,
                           adjoint.numel());
  with_sum_types(state_dtype, terms, [&]<class Accumulator, class Term>() {
    launch(adjoint_stage_kernel<Accumulator, Term>, blocks_for(sum.numel), kThreads, sum, b,
           scaling);
  });
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rampde, CUDA, m) { m.impl("adjoint_stage", boxed<&adjoint_stage>); }

}  // namespace rampde::cuda
