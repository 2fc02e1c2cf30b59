// Decision on the scale of the next step, meaning as in rampde.eager.update_scale.

#include "../boxing.h"
#include "../gradients.h"
#include "../scale_state.h"
#include "blockwise.h"

namespace rampde::cpu {
namespace {

void update_scale(const Tensor& scale_state, const OptionalTensorList& gradients,
                  const double& target, const double& decrease_factor,
                  const double& increase_factor, const int64_t& increase_interval,
                  const double& delta, const int64_t& steps) {
  constexpr const char* op = "update_scale";
  float* state = write_scale_state(op, scale_state, "itself", scale_state);
  std::atomic<bool> finite{true};
  TensorList copies;
  for (size_t i = 0; i < gradients.size(); ++i) {
    if (!gradients[i]) continue;
    const Argument argument{op, "gradients", static_cast<int64_t>(i)};
    check_device(argument, *gradients[i], "scale_state", scale_state);
    const Operand gradient = read_anywhere(argument, *gradients[i], copies);
    for_each_block(gradients[i]->numel(), [&](int64_t begin, int64_t count) {
      if (!all_finite(at(gradient, begin), gradient.dtype, count)) {
        finite.store(false, std::memory_order_relaxed);
      }
    });
  }
  decide_scale(
      state, finite.load(std::memory_order_relaxed),
      make_policy(target, decrease_factor, increase_factor, increase_interval, delta, steps));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rampde, CPU, m) { m.impl("update_scale", boxed<&update_scale>); }

}  // namespace rampde::cpu
