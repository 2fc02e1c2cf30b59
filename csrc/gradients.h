// Checks of the lists of gradients that accumulate_gradients and update_scale take.

#pragma once

#include "operands.h"

namespace rampde {

// A tensor of any layout, read element by element in no particular order.
inline Operand read_anywhere(const Argument& argument, const Tensor& tensor, TensorList& copies) {
  const DType dtype = check_floating(argument, tensor.dtype_number());
  if (is_dense(tensor)) return {tensor.data(), dtype};
  copies.push_back(tensor.contiguous());
  return {copies.back().data(), dtype};
}

inline void check_counts(size_t totals, size_t gradients) {
  check(totals == 0 ? gradients == 0 : gradients % totals == 0,
        "rampde::accumulate_gradients: gradients has ", gradients,
        " tensors, expected a multiple of the number of totals, ", totals);
}

inline Output check_total(const TensorList& totals, size_t p) {
  const Argument argument{"accumulate_gradients", "totals", static_cast<int64_t>(p)};
  const Tensor& total = totals[p];
  const DType dtype = total.dtype();
  check(dtype == DType::Float32 || dtype == DType::Float64, argument, " has dtype ",
        DTypeName{total.dtype_number()}, ", expected float32 or float64");
  check_state(argument, total);
  if (p > 0) check_device(argument, total, "totals[0]", totals[0]);
  return {total.mutable_data(), dtype};
}

// `gradients[i]`, present, in the layout of its total
inline Operand check_gradient(const OptionalTensorList& gradients, size_t i,
                              const TensorList& totals, TensorList& copies) {
  return read_operand({"accumulate_gradients", "gradients", static_cast<int64_t>(i)}, *gradients[i],
                      "its total", totals[i % totals.size()], copies);
}

}  // namespace rampde
