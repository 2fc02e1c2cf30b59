// Cotangent of a stage's velocity, meaning as in rampde.eager.adjoint_stage.

#include <algorithm>

#include "../boxing.h"
#include "../leaves.h"
#include "../scale_state.h"
#include "blockwise.h"

namespace rampde::cpu {
namespace {

Tensor adjoint_stage(const Tensor& adjoint, const TensorList& vjps, const Tensor& h,
                     const double& b, const std::vector<double>& a, const DTypeArgument& dtype,
                     const std::optional<Tensor>& scale_state) {
  constexpr const char* op = "adjoint_stage";
  const DType state_dtype = check_state({op, "adjoint"}, adjoint);
  Terms terms;
  read_terms(terms, {op, "vjps"}, vjps, "a", a, "adjoint", adjoint);
  const double step = read_scalar(read_step_size(op, h, "adjoint", adjoint));
  const DType result_dtype = check_floating({op, "the result"}, dtype.number);
  double factor = b;
  if (scale_state) {
    factor *= read_scale_state(op, *scale_state, "adjoint", adjoint)[kScale];
  }

  Tensor result = adjoint.empty_like(dtype.number);
  const Operand base{b != 0.0 ? adjoint.data() : nullptr, state_dtype};
  const Output target{result.mutable_data(), result_dtype};
  with_accumulator(state_dtype, [&]<class Accumulator>() {
    for_each_block(adjoint.numel(), [&](int64_t begin, int64_t count) {
      Accumulator sums[kBlock];
      std::fill_n(sums, count, Accumulator{0});
      if (b != 0.0) add_scaled(sums, base, factor, begin, count);
      add_terms(sums, terms, step, begin, count);
      store(target, sums, begin, count);
    });
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
  results.reserve(adjoint.size());
  for (size_t i = 0; i < adjoint.size(); ++i) {
    std::vector<double> weights = a;
    const TensorList present = take_present(vjps, i, a.size(), &weights);
    results.push_back(adjoint_stage(adjoint[i], present, h, b, weights, numbers[i], scale_state));
  }
  return results;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rampde, CPU, m) {
  m.impl("adjoint_stage", boxed<&adjoint_stage>);
  m.impl("adjoint_stage_leaves", boxed<&adjoint_stage_leaves>);
}

}  // namespace rampde::cpu
