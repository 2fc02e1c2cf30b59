// The state of the loss scale, a float32 vector on the device, and the decision taken on it once a
// step. Indices as in rampde/scaling.py, meaning as in rampde.eager.update_scale.

#pragma once

#include <torch/headeronly/macros/Macros.h>

#include <cmath>

#include "operands.h"

namespace rampde {

enum ScaleStateIndex {
  kScale,
  kScaleOfStep,
  kMaximum,
  kFinite,
  kHeadroom,
  kCleanSteps,
  kCommittedSteps,
  kIncreased,
  kOverflowed,
  kScaleStateSize
};

struct ScalePolicy {
  float target;
  float decrease_factor;
  float increase_factor;
  float increase_interval;
  float delta;
  float steps;
};

// `finite`: whether all gradients of the step are
C10_HOST_DEVICE inline void decide_scale(float* state, bool finite, const ScalePolicy& policy) {
  const float scale = state[kScale];
  state[kScaleOfStep] = 0.0f;
  if (state[kOverflowed] != 0.0f) return;
  const float maximum = state[kMaximum];
  finite = finite && state[kFinite] != 0.0f;
  state[kMaximum] = 0.0f;
  state[kFinite] = 1.0f;
  if (!finite) {
    state[kOverflowed] = 1.0f;
    state[kHeadroom] *= policy.decrease_factor;
    state[kCleanSteps] = 0.0f;
    return;
  }
  state[kScaleOfStep] = scale;
  state[kCommittedSteps] += policy.steps;
  state[kCleanSteps] += policy.steps;
  if (state[kCleanSteps] >= policy.increase_interval && state[kHeadroom] < 1.0f) {
    const float headroom = state[kHeadroom] * policy.increase_factor;
    state[kHeadroom] = headroom < 1.0f ? headroom : 1.0f;
    state[kCleanSteps] = 0.0f;
    state[kIncreased] += 1.0f;
  }
  if (maximum > 0.0f) {
    // frexp is exact where log2 rounds: m * 2^e with m in [1/2, 1) has floor(log2) = e - 1
    const float ratio = policy.target / (maximum + policy.delta);
    int exponent = 97;
    if (ratio < INFINITY) frexpf(ratio, &exponent);
    --exponent;
    exponent = exponent < -96 ? -96 : exponent > 96 ? 96 : exponent;
    state[kScale] = state[kHeadroom] * ldexpf(1.0f, exponent);
  }
}

inline ScalePolicy make_policy(double target, double decrease_factor, double increase_factor,
                               int64_t increase_interval, double delta, int64_t steps) {
  return {static_cast<float>(target),          static_cast<float>(decrease_factor),
          static_cast<float>(increase_factor), static_cast<float>(increase_interval),
          static_cast<float>(delta),           static_cast<float>(steps)};
}

inline void check_scale_state(const char* op, const Tensor& scale_state, const char* state_name,
                              const Tensor& state) {
  const Argument argument{op, "scale_state"};
  check(scale_state.dim() == 1 && scale_state.size(0) == kScaleStateSize, argument, " has shape ",
        Shape{scale_state}, ", expected [", +kScaleStateSize, "]");
  check(scale_state.stride(0) == 1, argument, " is not contiguous");
  check(scale_state.dtype() == DType::Float32, argument, " has dtype ",
        DTypeName{scale_state.dtype_number()}, ", expected float32");
  check_device(argument, scale_state, state_name, state);
}

inline const float* read_scale_state(const char* op, const Tensor& scale_state,
                                     const char* state_name, const Tensor& state) {
  check_scale_state(op, scale_state, state_name, state);
  return static_cast<const float*>(scale_state.data());
}

inline float* write_scale_state(const char* op, const Tensor& scale_state, const char* state_name,
                                const Tensor& state) {
  check_scale_state(op, scale_state, state_name, state);
  return static_cast<float*>(scale_state.mutable_data());
}

}  // namespace rampde
