// Steps in 8 bits, codes and block scales as in rampde.fp8_blocks: their checks, and how the
// operators that end a step read and write them.

#pragma once

#include <initializer_list>
#include <optional>

#include "blockwise.h"

namespace rampde::cpu {

// each block of a loop owns whole blocks of scales
static_assert(kBlock % kScaleBlock == 0);

struct QuantisedOperand {
  const uint8_t* codes;
  const float* scales;
};

// rounded at random where there is a seed
struct QuantisedOutput {
  uint8_t* codes;
  float* scales;
  std::optional<int64_t> seed;
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

struct Given {
  const char* name;
  bool given;
};

// The state, where it is a step in 8 bits instead; the others say nothing then, and must be absent.
inline std::optional<QuantisedOperand> read_quantised(const Argument& argument, const Tensor& state,
                                                      const std::optional<Tensor>& scales,
                                                      std::initializer_list<Given> others) {
  if (state.dtype_number() != aoti_torch_dtype_float8_e4m3fn()) return std::nullopt;
  for (const Given& other : others) {
    check(!other.given, Argument{argument.op, other.name}, " is given, expected None where ",
          argument.name, " has dtype ", DTypeName{state.dtype_number()});
  }
  check_quantised(argument, &state, scales ? &*scales : nullptr, argument.name, state);
  return QuantisedOperand{static_cast<const uint8_t*>(state.data()),
                          static_cast<const float*>(scales->data())};
}

// Nothing where neither is given.
inline std::optional<QuantisedOutput> write_quantised(const Argument& argument,
                                                      const std::optional<Tensor>& codes,
                                                      const std::optional<Tensor>& scales,
                                                      const std::optional<int64_t>& seed,
                                                      const char* state_name, const Tensor& state) {
  check(codes || !seed, Argument{argument.op, "seed"}, " is ", seed.value_or(0),
        ", expected None without ", argument.name);
  if (!codes && !scales) return std::nullopt;
  check_quantised(argument, codes ? &*codes : nullptr, scales ? &*scales : nullptr, state_name,
                  state);
  return QuantisedOutput{static_cast<uint8_t*>(codes->mutable_data()),
                         static_cast<float*>(scales->mutable_data()), seed};
}

template <class Accumulator>
void advance(Accumulator* total, const QuantisedOperand& base, const Terms& terms, double factor,
             int64_t begin, int64_t count) {
  sum_terms(total, terms, factor, begin, count);
  sum_kernels<Accumulator>().add_quantised(total, base.codes + begin,
                                           base.scales + begin / kScaleBlock, count);
}

// Minus the sums, by way of float.
template <class Accumulator>
void store_negated(const QuantisedOutput& x, const Accumulator* sums, int64_t begin,
                   int64_t count) {
  uint8_t* const codes = x.codes + begin;
  float* const scales = x.scales + begin / kScaleBlock;
  if constexpr (std::is_same_v<Accumulator, double>) {
    float narrowed[kBlock];
    store(Output{narrowed, DType::Float32}, sums, 0, count);
    store_negated(x, narrowed, begin, count);
  } else if (x.seed) {
    kernels().quantise_negated_randomly(codes, scales, sums, *x.seed, begin, count);
  } else {
    kernels().quantise_negated(codes, scales, sums, count);
  }
}

// `total = y + h * sum_j coefficient_j * term_j`; `lost`, where given, carries what the sum rounds
// away, and `backwards` receives minus all that is added to `y`
template <class Accumulator>
void step(Accumulator* total, const Operand& y, const Terms& terms, double h,
          const std::optional<Output>& lost, const std::optional<QuantisedOutput>& backwards,
          int64_t begin, int64_t count) {
  if (!lost) {
    sum_terms(total, terms, h, begin, count);
    if (backwards) store_negated(*backwards, total, begin, count);
    return add_scaled(total, y, 1.0, begin, count);
  }
  load(total, y, begin, count);
  Accumulator increment[kBlock];
  load(increment, Operand{lost->data, lost->dtype}, begin, count);
  add_terms(increment, terms, h, begin, count);
  if (backwards) store_negated(*backwards, increment, begin, count);
  sum_kernels<Accumulator>().two_sum(total, increment, count);
  store(*lost, increment, begin, count);
}

}  // namespace rampde::cpu
