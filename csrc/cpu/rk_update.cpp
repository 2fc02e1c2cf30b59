// End of a Runge-Kutta step, meaning as in rampde.eager.rk_update.

#include "../boxing.h"
#include "../leaves.h"
#include "fp8.h"

namespace rampde::cpu {
namespace {

void rk_update(const Tensor& y, const TensorList& k, const Tensor& h, const std::vector<double>& b,
               const Tensor& y_next, const std::optional<Tensor>& checkpoint,
               const std::optional<Tensor>& compensation,
               const std::optional<Tensor>& overflow_step, const int64_t& step,
               const std::optional<Tensor>& quantised, const std::optional<Tensor>& block_scales,
               const std::optional<int64_t>& seed) {
  constexpr const char* op = "rk_update";
  const std::optional<QuantisedOperand> coded =
      read_quantised({op, "y"}, y, block_scales,
                     {{"compensation", compensation.has_value()},
                      {"quantised", quantised.has_value()},
                      {"seed", seed.has_value()}});
  const DType state_dtype = coded ? DType::Other : check_state({op, "y"}, y);
  Terms terms;
  read_terms(terms, {op, "k"}, k, "b", b, "y", y);
  const double step_size = read_scalar(read_step_size(op, h, "y", y));
  const Operand base{y.data(), state_dtype};
  const Output next = write_operand({op, "y_next"}, y_next, "y", y);
  std::optional<Output> saved, error;
  if (checkpoint) saved = write_operand({op, "checkpoint"}, *checkpoint, "y", y);
  if (compensation) error = write_operand({op, "compensation"}, *compensation, "y", y);
  std::optional<QuantisedOutput> backwards;
  if (!coded) backwards = write_quantised({op, "quantised"}, quantised, block_scales, seed, "y", y);
  if (overflow_step) {
    const Argument argument{op, "overflow_step"};
    check(overflow_step->dim() == 0, argument, " has shape ", Shape{*overflow_step},
          ", expected a 0-dim tensor");
    check(overflow_step->dtype_number() == aoti_torch_dtype_int64(), argument, " has dtype ",
          DTypeName{overflow_step->dtype_number()}, ", expected int64");
  }

  const Output& checked = saved ? *saved : next;
  std::atomic<bool> finite{true};
  const DType decides = error ? error->dtype : coded ? next.dtype : state_dtype;
  with_accumulator(decides, [&]<class Accumulator>() {
    for_each_block(y.numel(), [&](int64_t begin, int64_t count) {
      Accumulator sums[kBlock];
      if (coded) {
        advance(sums, *coded, terms, step_size, begin, count);
      } else {
        cpu::step(sums, base, terms, step_size, error, backwards, begin, count);
      }
      store(next, sums, begin, count);
      if (saved) store(*saved, sums, begin, count);
      if (overflow_step && !all_finite(at(checked, begin), checked.dtype, count)) {
        finite.store(false, std::memory_order_relaxed);
      }
    });
  });
  if (overflow_step && !finite.load(std::memory_order_relaxed)) {
    int64_t& first = *static_cast<int64_t*>(overflow_step->mutable_data());
    first = step < first ? step : first;
  }
}

void rk_update_leaves(const TensorList& y, TensorList& k, const Tensor& h,
                      const std::vector<double>& b, const TensorList& y_next,
                      TensorList& checkpoints, TensorList& compensations,
                      const std::optional<Tensor>& overflow_step, const int64_t& step) {
  constexpr const char* op = "rk_update_leaves";
  const size_t count = count_of_leaf({op, "k"}, k, y.size());
  check_one_of_leaf({op, "y_next"}, y_next, y.size());
  check_optional_leaves({op, "checkpoints"}, checkpoints, y.size());
  check_optional_leaves({op, "compensations"}, compensations, y.size());
  for (size_t i = 0; i < y.size(); ++i) {
    rk_update(y[i], take_leaf(k, i, count), h, b, y_next[i], take_optional(checkpoints, i),
              take_optional(compensations, i), overflow_step, step, {}, {}, {});
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rampde, CPU, m) {
  m.impl("rk_update", boxed<&rk_update>);
  m.impl("rk_update_leaves", boxed<&rk_update_leaves>);
}

}  // namespace rampde::cpu
