// End of a step backwards, meaning as in rampde.eager.adjoint_update.

#include <bit>

#include "../boxing.h"
#include "../leaves.h"
#include "../scale_state.h"
#include "blockwise.h"

namespace rampde::cpu {
namespace {

// Order does not show in a maximum: threads may come as they like.
void raise_to(std::atomic<uint64_t>& maximum, uint64_t value) {
  uint64_t seen = maximum.load(std::memory_order_relaxed);
  while (seen < value && !maximum.compare_exchange_weak(seen, value, std::memory_order_relaxed)) {
  }
}

// what the sums were like, noted for the decision on the scale
template <class Accumulator>
void note_largest(float* scale_state, uint64_t bits, DType dtype) {
  if (bits >= infinity_bits(dtype)) {
    scale_state[kFinite] = 0.0f;
    return;
  }
  using Bits = std::conditional_t<std::is_same_v<Accumulator, double>, uint64_t, uint32_t>;
  const auto largest = static_cast<float>(std::bit_cast<Accumulator>(static_cast<Bits>(bits)));
  if (largest > scale_state[kMaximum]) scale_state[kMaximum] = largest;
}

void adjoint_update(const Tensor& adjoint, const TensorList& vjps, const Tensor& h,
                    const std::optional<Tensor>& cotangent, const Tensor& adjoint_next,
                    const std::optional<Tensor>& scale_state) {
  constexpr const char* op = "adjoint_update";
  const DType state_dtype = check_state({op, "adjoint"}, adjoint);
  Terms terms;
  read_terms(terms, {op, "vjps"}, vjps, "adjoint", adjoint, [](size_t) { return 1.0; });
  double factor = read_scalar(read_step_size(op, h, "adjoint", adjoint));
  const Operand base{adjoint.data(), state_dtype};
  const Output next = write_operand({op, "adjoint_next"}, adjoint_next, "adjoint", adjoint);
  std::optional<Operand> loss;
  if (cotangent) {
    loss = read_operand({op, "cotangent"}, *cotangent, "adjoint", adjoint, terms.copies);
  }
  float* scaling = nullptr;
  if (scale_state) {
    scaling = write_scale_state(op, *scale_state, "adjoint", adjoint);
    if (scaling[kOverflowed] != 0.0f) return;
    factor /= scaling[kScale];
  }

  with_accumulator(state_dtype, [&]<class Accumulator>() {
    constexpr DType dtype = std::is_same_v<Accumulator, double> ? DType::Float64 : DType::Float32;
    std::atomic<uint64_t> maximum{0};
    for_each_block(adjoint.numel(), [&](int64_t begin, int64_t count) {
      Accumulator sums[kBlock];
      advance(sums, base, terms, factor, begin, count);
      if (loss) add_scaled(sums, *loss, 1.0, begin, count);
      store(next, sums, begin, count);
      if (scaling != nullptr) raise_to(maximum, largest(sums, dtype, count));
    });
    if (scaling != nullptr) note_largest<Accumulator>(scaling, maximum.load(), dtype);
  });
}

void adjoint_update_leaves(const TensorList& adjoint, OptionalTensorList& vjps, const Tensor& h,
                           const OptionalTensorList& cotangents, const TensorList& adjoint_next,
                           const std::optional<Tensor>& scale_state) {
  constexpr const char* op = "adjoint_update_leaves";
  const size_t count = count_of_leaf({op, "vjps"}, vjps, adjoint.size());
  check_one_of_leaf({op, "cotangents"}, cotangents, adjoint.size());
  check_one_of_leaf({op, "adjoint_next"}, adjoint_next, adjoint.size());
  for (size_t i = 0; i < adjoint.size(); ++i) {
    adjoint_update(adjoint[i], take_present(vjps, i, count), h, cotangents[i], adjoint_next[i],
                   scale_state);
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rampde, CPU, m) {
  m.impl("adjoint_update", boxed<&adjoint_update>);
  m.impl("adjoint_update_leaves", boxed<&adjoint_update_leaves>);
}

}  // namespace rampde::cpu
