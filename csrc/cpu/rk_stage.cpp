// Input of a Runge-Kutta stage, meaning as in rampde.eager.rk_stage.

#include "../boxing.h"
#include "fp8.h"

namespace rampde::cpu {
namespace {

Tensor rk_stage(const Tensor& y, const TensorList& k, const Tensor& h, const std::vector<double>& a,
                const DTypeArgument& dtype, const std::optional<Tensor>& block_scales) {
  constexpr const char* op = "rk_stage";
  const std::optional<QuantisedOperand> quantised = read_quantised({op, "y"}, y, block_scales);
  const DType state_dtype = quantised ? DType::Float32 : check_state({op, "y"}, y);
  Terms terms;
  read_terms(terms, {op, "k"}, k, "a", a, "y", y);
  const double step = read_scalar(read_step_size(op, h, "y", y));
  const DType result_dtype = check_floating({op, "the result"}, dtype.number);

  Tensor result = y.empty_like(dtype.number);
  const Output target{result.mutable_data(), result_dtype};
  const auto fill = [&]<class Accumulator>(Accumulator, const auto& base) {
    for_each_block(y.numel(), [&](int64_t begin, int64_t count) {
      Accumulator sums[kBlock];
      advance(sums, base, terms, step, begin, count);
      store(target, sums, begin, count);
    });
  };
  if (quantised) {
    fill(float{}, *quantised);
  } else {
    const Operand base{y.data(), state_dtype};
    with_accumulator(state_dtype, [&]<class Accumulator>() { fill(Accumulator{}, base); });
  }
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rampde, CPU, m) { m.impl("rk_stage", boxed<&rk_stage>); }

}  // namespace rampde::cpu
