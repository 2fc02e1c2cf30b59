// Decision on the scale of the next step, meaning as in rampde.eager.update_scale.

#include "../boxing.h"
#include "../gradients.h"
#include "../scale_state.h"
#include "chunks.h"
#include "launch.h"
#include "vectors.cuh"

namespace rampde::cuda {
namespace {

// fits the 4 KiB of arguments that every CUDA version passes to a kernel
constexpr int kTensors = 150;

struct Gradients {
  Chunks<kTensors> chunks;
  const void* data[kTensors];
  DType dtype[kTensors];
};
static_assert(sizeof(Gradients) + sizeof(void*) <= 4096);

__global__ void __launch_bounds__(kThreads)
    check_finite_kernel(const __grid_constant__ Gradients gradients, float* state) {
  if (state[kOverflowed] != 0.0f) return;
  const auto place = gradients.chunks.find(blockIdx.x);
  const void* data = gradients.data[place.tensor];
  bool finite = true;
  with_type(gradients.dtype[place.tensor], [&]<class T>() {
    const bool aligned = reinterpret_cast<uintptr_t>(data) % kAlignment == 0;
    for_each_vector(place.begin, place.end, aligned, threadIdx.x, kThreads,
                    [&]<int kCount>(int64_t i) {
                      using Wide = std::conditional_t<std::is_same_v<T, double>, double, float>;
                      const Pack<T, kCount> pack = read<kCount, T>(data, i);
#pragma unroll
                      for (int j = 0; j < kCount; ++j) {
                        finite = finite && isfinite(convert<Wide>(pack.item[j]));
                      }
                    });
  });
  // all who write this write the same
  if (!finite) state[kFinite] = 0.0f;
}

__global__ void decide_kernel(float* state, ScalePolicy policy) {
  decide_scale(state, /*finite=*/true, policy);
}

void update_scale(const Tensor& scale_state, const OptionalTensorList& gradients,
                  const double& target, const double& decrease_factor,
                  const double& increase_factor, const int64_t& increase_interval,
                  const double& delta, const int64_t& steps) {
  constexpr const char* op = "update_scale";
  const Launcher launch(op, scale_state);
  float* state = write_scale_state(op, scale_state, "itself", scale_state);
  TensorList copies;
  Gradients batch;
  const auto flush = [&] {
    launch(check_finite_kernel, batch.chunks.blocks(), kThreads, batch, state);
    batch.chunks.tensors = 0;
  };
  for (size_t i = 0; i < gradients.size(); ++i) {
    if (!gradients[i]) continue;
    const Argument argument{op, "gradients", static_cast<int64_t>(i)};
    check_device(argument, *gradients[i], "scale_state", scale_state);
    const Operand gradient = read_anywhere(argument, *gradients[i], copies);
    const int64_t numel = gradients[i]->numel();
    if (numel == 0) continue;
    const int index = batch.chunks.add(numel);
    batch.data[index] = gradient.data;
    batch.dtype[index] = gradient.dtype;
    if (batch.chunks.full()) flush();
  }
  flush();
  launch(decide_kernel, 1, 1, state,
         make_policy(target, decrease_factor, increase_factor, increase_interval, delta, steps));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rampde, CUDA, m) { m.impl("update_scale", boxed<&update_scale>); }

}  // namespace rampde::cuda
