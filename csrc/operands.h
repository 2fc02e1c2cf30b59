// Checks of the operands that all operators share, and the list of terms that a fused sum reads.

#pragma once

#include <cmath>
#include <string_view>

#include "tensor.h"

namespace rampde {

// Names an argument in messages: "k" or, for an element of a list, "k[2]".
struct Argument {
  const char* op;
  const char* name;
  int64_t index = -1;
};

inline std::ostream& operator<<(std::ostream& out, const Argument& argument) {
  out << "rampde::" << argument.op << ": " << argument.name;
  if (argument.index >= 0) out << '[' << argument.index << ']';
  return out;
}

inline DType check_floating(const Argument& argument, int32_t number) {
  const DType dtype = dtype_of_number(number);
  check(dtype != DType::Other, argument, " has dtype ", DTypeName{number},
        ", expected float64, float32, float16 or bfloat16");
  return dtype;
}

inline void check_dense(const Argument& argument, const Tensor& tensor) {
  check(is_dense(tensor), argument, " of shape ", Shape{tensor},
        " has gaps or overlaps in memory, expected a dense tensor: call contiguous() on it first");
}

// the tensor that decides shape, layout and device of all others
inline DType check_state(const Argument& argument, const Tensor& state) {
  check_dense(argument, state);
  return check_floating(argument, state.dtype_number());
}

inline void check_shape(const Argument& argument, const Tensor& tensor, const char* state_name,
                        const Tensor& state) {
  check(same_shape(tensor, state), argument, " has shape ", Shape{tensor}, ", expected that of ",
        state_name, ", ", Shape{state});
}

inline void check_device(const Argument& argument, const Tensor& tensor, const char* state_name,
                         const Tensor& state) {
  check(tensor.device() == state.device(), argument, " is on another device than ", state_name,
        ", expected the same");
}

inline void check_layout(const Argument& argument, const Tensor& tensor, const char* state_name,
                         const Tensor& state) {
  check(same_layout(tensor, state), argument, " is laid out in memory differently than ",
        state_name, ", expected the same strides: create it with torch.empty_like");
}

// An operand that is read: its data in the layout of the state, copied into it where necessary.
struct Operand {
  const void* data;
  DType dtype;
};

inline Operand read_operand(const Argument& argument, const Tensor& tensor, const char* state_name,
                            const Tensor& state, TensorList& copies) {
  check_shape(argument, tensor, state_name, state);
  check_device(argument, tensor, state_name, state);
  const DType dtype = check_floating(argument, tensor.dtype_number());
  if (same_layout(tensor, state)) return {tensor.data(), dtype};
  copies.push_back(state.empty_like(tensor.dtype_number()));
  copies.back().copy_from(tensor);
  return {copies.back().data(), dtype};
}

// An operand that is written: must have the layout of the state already.
struct Output {
  void* data;
  DType dtype;
};

inline Output write_operand(const Argument& argument, const Tensor& tensor, const char* state_name,
                            const Tensor& state) {
  check_shape(argument, tensor, state_name, state);
  check_device(argument, tensor, state_name, state);
  check_layout(argument, tensor, state_name, state);
  return {tensor.mutable_data(), check_floating(argument, tensor.dtype_number())};
}

// A 0-dim operand that is read on its device.
inline Operand read_step_size(const char* op, const Tensor& h, const char* state_name,
                              const Tensor& state) {
  const Argument argument{op, "h"};
  check(h.dim() == 0, argument, " has shape ", Shape{h}, ", expected a 0-dim tensor");
  const DType dtype = h.dtype();
  check(dtype == DType::Float64 || dtype == DType::Float32, argument, " has dtype ",
        DTypeName{h.dtype_number()}, ", expected float64 or float32");
  check_device(argument, h, state_name, state);
  return {h.data(), dtype};
}

inline constexpr int kMaxTerms = 16;

// The terms of a fused sum; one whose coefficient is zero is left out and never read.
struct Terms {
  struct Term {
    const void* data;
    double coefficient;
    DType dtype;
  };
  Term term[kMaxTerms];
  int count = 0;
  TensorList copies;

  void add(const Operand& operand, double coefficient) {
    term[count++] = {operand.data, coefficient, operand.dtype};
  }
};

// `coefficient(j)` is that of `tensors[j]`.
template <class Coefficient>
void read_terms(Terms& terms, const Argument& argument, const TensorList& tensors,
                const char* state_name, const Tensor& state, const Coefficient& coefficient) {
  for (size_t j = 0; j < tensors.size(); ++j) {
    const double c = coefficient(j);
    if (c == 0.0) continue;
    const Argument item{argument.op, argument.name, static_cast<int64_t>(j)};
    check(terms.count < kMaxTerms, item, " is one too many, expected at most ", kMaxTerms,
          " terms with a coefficient that is not zero");
    terms.add(read_operand(item, tensors[j], state_name, state, terms.copies), c);
  }
}

inline void check_coefficients(const Argument& argument, const TensorList& tensors,
                               const char* coefficients_name,
                               const std::vector<double>& coefficients) {
  check(tensors.size() == coefficients.size(), argument, " has ", tensors.size(), " tensors, but ",
        coefficients_name, " has ", coefficients.size(),
        " coefficients, expected as many of one as of the other");
}

inline void read_terms(Terms& terms, const Argument& argument, const TensorList& tensors,
                       const char* coefficients_name, const std::vector<double>& coefficients,
                       const char* state_name, const Tensor& state) {
  check_coefficients(argument, tensors, coefficients_name, coefficients);
  read_terms(terms, argument, tensors, state_name, state,
             [&](size_t j) { return coefficients[j]; });
}

}  // namespace rampde
