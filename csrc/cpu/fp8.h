// States in 8 bits, codes and block scales as in rampde.fp8_blocks: their checks, and how the
// operators read and write them.

#pragma once

#include <optional>

#include "blockwise.h"

namespace rampde::cpu {

// each block of a loop owns whole blocks of scales
static_assert(kBlock % kScaleBlock == 0);

struct QuantisedOperand {
  const uint8_t* codes;
  const float* scales;
};

struct QuantisedOutput {
  uint8_t* codes;
  float* scales;
};

// Codes, named by `argument`, and block scales are both given, and laid out for the state.
inline void check_quantised(const Argument& argument, const Tensor* codes, const Tensor* scales,
                            const char* state_name, const Tensor& state) {
  const Argument of_scales{argument.op, "block_scales"};
  const DTypeName dtype{aoti_torch_dtype_float8_e4m3fn()};
  check(scales != nullptr, of_scales, " is None, expected the scales of ", argument.name,
        ", which is in ", dtype);
  check(codes != nullptr, argument, " is None, expected a ", dtype, " tensor beside block_scales");
  check(codes->dtype_number() == dtype.number, argument, " has dtype ",
        DTypeName{codes->dtype_number()}, ", expected ", dtype, " beside block_scales");
  check_dense(argument, *codes);
  check_shape(argument, *codes, state_name, state);
  check_device(argument, *codes, state_name, state);
  check_layout(argument, *codes, state_name, state);
  check(scales->dtype_number() == aoti_torch_dtype_float32(), of_scales, " has dtype ",
        DTypeName{scales->dtype_number()}, ", expected float32");
  const int64_t blocks = (state.numel() + kScaleBlock - 1) / kScaleBlock;
  check(scales->dim() == 1 && scales->size(0) == blocks, of_scales, " has shape ", Shape{*scales},
        ", expected [", blocks, "], one for each ", kScaleBlock, " elements of ", state_name);
  check(is_contiguous(*scales), of_scales, " has gaps in memory, expected it contiguous");
  check_device(of_scales, *scales, state_name, state);
}

// The state itself, where it is in 8 bits or has block scales.
inline std::optional<QuantisedOperand> read_quantised(const Argument& argument, const Tensor& state,
                                                      const std::optional<Tensor>& scales) {
  if (!scales && state.dtype_number() != aoti_torch_dtype_float8_e4m3fn()) return std::nullopt;
  check_quantised(argument, &state, scales ? &*scales : nullptr, argument.name, state);
  return QuantisedOperand{static_cast<const uint8_t*>(state.data()),
                          static_cast<const float*>(scales->data())};
}

// Nothing where neither is given.
inline std::optional<QuantisedOutput> write_quantised(const Argument& argument,
                                                      const std::optional<Tensor>& codes,
                                                      const std::optional<Tensor>& scales,
                                                      const char* state_name, const Tensor& state) {
  if (!codes && !scales) return std::nullopt;
  check_quantised(argument, codes ? &*codes : nullptr, scales ? &*scales : nullptr, state_name,
                  state);
  return QuantisedOutput{static_cast<uint8_t*>(codes->mutable_data()),
                         static_cast<float*>(scales->mutable_data())};
}

inline void advance(float* total, const QuantisedOperand& base, const Terms& terms, double factor,
                    int64_t begin, int64_t count) {
  sum_terms(total, terms, factor, begin, count);
  kernels().add_quantised(total, base.codes + begin, base.scales + begin / kScaleBlock, count);
}

// By way of float; at random where there is a seed.
template <class Accumulator>
void store(const QuantisedOutput& x, const std::optional<int64_t>& seed, const Accumulator* sums,
           int64_t begin, int64_t count) {
  uint8_t* const codes = x.codes + begin;
  float* const scales = x.scales + begin / kScaleBlock;
  if constexpr (std::is_same_v<Accumulator, double>) {
    float narrowed[kBlock];
    store(Output{narrowed, DType::Float32}, sums, 0, count);
    store(x, seed, narrowed, begin, count);
  } else if (seed) {
    kernels().quantise_randomly(codes, scales, sums, *seed, begin, count);
  } else {
    kernels().quantise(codes, scales, sums, count);
  }
}

}  // namespace rampde::cpu
