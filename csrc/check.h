// Errors for people: a message that names operator, argument, what was found and what is expected.

#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <sstream>
#include <stdexcept>

namespace rampde {

template <class... Parts>
[[noreturn, gnu::cold, gnu::noinline]] void fail(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

// STD_TORCH_CHECK without the source path of the build machine in front of the message
template <class... Parts>
void check(bool condition, const Parts&... parts) {
  if (!condition) [[unlikely]]
    fail(parts...);
}

// for calls of the stable C interface, which fail only when memory or the device does
inline void check_shim(AOTITorchError error, const char* what) {
  check(error == 0, "rampde: PyTorch could not ", what);
}

}  // namespace rampde
