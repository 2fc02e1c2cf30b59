// What every CUDA entry needs, in this order: device guard, current stream, launch, launch check.

#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/c/shim.h>

#include "../tensor.h"

namespace rampde::cuda {

inline constexpr int kThreads = 256;

// enough blocks to fill any device several times over; a thread takes more than one vector beyond
inline constexpr int64_t kMaxBlocks = 4096;

class Launcher {
 public:
  Launcher(const char* op, const Tensor& state) : Launcher(op, state.device().second) {}

  // Enqueues `kernel` on the current stream of the device; an empty grid is left out.
  template <class... Parameters, class... Arguments>
  void operator()(void (*kernel)(Parameters...), int64_t blocks, int threads,
                  const Arguments&... arguments) const {
    if (blocks == 0) return;
    kernel<<<static_cast<unsigned>(blocks), threads, 0, stream_>>>(arguments...);
    const cudaError_t error = cudaGetLastError();
    check(error == cudaSuccess, "rampde::", op_,
          ": CUDA did not accept the kernel: ", cudaGetErrorString(error));
  }

 private:
  Launcher(const char* op, int32_t device) : op_(op), guard_(device) {
    void* stream;
    check_shim(aoti_torch_get_current_cuda_stream(device, &stream), "find the current stream");
    stream_ = static_cast<cudaStream_t>(stream);
  }

  const char* op_;
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_;
};

}  // namespace rampde::cuda
