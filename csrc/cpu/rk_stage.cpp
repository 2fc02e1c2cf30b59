// Input of a Runge-Kutta stage, meaning as in rampde.eager.rk_stage.

#include "../boxing.h"
#include "../leaves.h"
#include "blockwise.h"

namespace rampde::cpu {
namespace {

Tensor rk_stage(const Tensor& y, const TensorList& k, const Tensor& h, const std::vector<double>& a,
                const DTypeArgument& dtype) {
  constexpr const char* op = "rk_stage";
  const DType state_dtype = check_state({op, "y"}, y);
  Terms terms;
  read_terms(terms, {op, "k"}, k, "a", a, "y", y);
  const double step = read_scalar(read_step_size(op, h, "y", y));
  const DType result_dtype = check_floating({op, "the result"}, dtype.number);

  Tensor result = y.empty_like(dtype.number);
  const Operand base{y.data(), state_dtype};
  const Output target{result.mutable_data(), result_dtype};
  with_accumulator(state_dtype, [&]<class Accumulator>() {
    for_each_block(y.numel(), [&](int64_t begin, int64_t count) {
      Accumulator sums[kBlock];
      advance(sums, base, terms, step, begin, count);
      store(target, sums, begin, count);
    });
  });
  return result;
}

TensorList rk_stage_leaves(const TensorList& y, TensorList& k, const Tensor& h,
                           const std::vector<double>& a, const std::vector<int64_t>& dtypes) {
  const auto numbers = read_dtypes("rk_stage_leaves", dtypes, y.size());
  const size_t count = count_of_leaf({"rk_stage_leaves", "k"}, k, y.size());
  TensorList results;
  results.reserve(y.size());
  for (size_t i = 0; i < y.size(); ++i) {
    results.push_back(rk_stage(y[i], take_leaf(k, i, count), h, a, numbers[i]));
  }
  return results;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rampde, CPU, m) {
  m.impl("rk_stage", boxed<&rk_stage>);
  m.impl("rk_stage_leaves", boxed<&rk_stage_leaves>);
}

}  // namespace rampde::cpu
