// Sums of the parameters' gradients, meaning as in rampde.eager.accumulate_gradients.

#include "../boxing.h"
#include "../gradients.h"
#include "../scale_state.h"
#include "blockwise.h"

namespace rampde::cpu {
namespace {

void accumulate_gradients(const TensorList& totals, const OptionalTensorList& gradients,
                          const Tensor& h, const std::optional<Tensor>& scale_state) {
  constexpr const char* op = "accumulate_gradients";
  check_counts(totals.size(), gradients.size());
  if (totals.empty()) return;
  double factor = read_scalar(read_step_size(op, h, "totals[0]", totals[0]));
  if (scale_state) {
    const float scale = read_scale_state(op, *scale_state, "totals[0]", totals[0])[kScaleOfStep];
    if (scale == 0.0f) return;
    factor /= scale;
  }

  for (size_t p = 0; p < totals.size(); ++p) {
    const Output total = check_total(totals, p);
    Terms terms;
    const auto flush = [&] {
      with_accumulator(total.dtype, [&]<class Accumulator>() {
        for_each_block(totals[p].numel(), [&](int64_t begin, int64_t count) {
          auto* sums = static_cast<Accumulator*>(at(total, begin));
          add_terms(sums, terms, factor, begin, count);
        });
      });
      terms.count = 0;
    };
    for (size_t i = p; i < gradients.size(); i += totals.size()) {
      if (!gradients[i]) continue;
      if (terms.count == kMaxTerms) flush();
      terms.add(check_gradient(gradients, i, totals, terms.copies), 1.0);
    }
    if (terms.count > 0) flush();
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rampde, CPU, m) {
  m.impl("accumulate_gradients", boxed<&accumulate_gradients>);
}

}  // namespace rampde::cpu
