// The floating dtypes that operands may have, as a small code that kernels switch on.

#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <cstdint>
#include <ostream>

namespace rampde {

enum class DType : uint8_t { Float64, Float32, Float16, BFloat16, Other };

// number of dtypes that kernels understand, the length of tables indexed by DType
inline constexpr int kDTypes = 4;

constexpr int64_t element_size(DType dtype) {
  return dtype == DType::Float64 ? 8 : dtype == DType::Float32 ? 4 : 2;
}

// PyTorch's numbers for dtypes are not part of the stable interface: they are asked for, once
struct DTypeNumbers {
  int32_t number[kDTypes] = {aoti_torch_dtype_float64(), aoti_torch_dtype_float32(),
                             aoti_torch_dtype_float16(), aoti_torch_dtype_bfloat16()};
};
inline const DTypeNumbers kDTypeNumbers;

inline DType dtype_of_number(int32_t number) {
  for (int i = 0; i < kDTypes; ++i) {
    if (kDTypeNumbers.number[i] == number) return static_cast<DType>(i);
  }
  return DType::Other;
}

// The dtype as text, looked up only when a message needs it.
struct DTypeName {
  int32_t number;
};

inline std::ostream& operator<<(std::ostream& out, DTypeName name) {
  constexpr const char* names[] = {"float64", "float32", "float16", "bfloat16"};
  const DType dtype = dtype_of_number(name.number);
  if (dtype != DType::Other) return out << names[static_cast<int>(dtype)];
  if (name.number == aoti_torch_dtype_float8_e4m3fn()) return out << "float8_e4m3fn";
  if (name.number == aoti_torch_dtype_int64()) return out << "int64";
  if (name.number == aoti_torch_dtype_int32()) return out << "int32";
  if (name.number == aoti_torch_dtype_bool()) return out << "bool";
  if (name.number == aoti_torch_dtype_complex64()) return out << "complex64";
  if (name.number == aoti_torch_dtype_complex128()) return out << "complex128";
  return out << "one that rampde does not know";
}

// the dtype in which sums with a term of `dtype` are formed
constexpr DType accumulation_dtype(DType dtype) {
  return dtype == DType::Float64 ? DType::Float64 : DType::Float32;
}

}  // namespace rampde
