// An owned tensor handle with its metadata read once. torch::stable::Tensor would do, but allocates
// a reference count for each handle, and a step on a small state costs little more than its
// handles.

#pragma once

#include <torch/csrc/stable/c/shim.h>

#include <cstdint>
#include <optional>
#include <ostream>
#include <utility>
#include <vector>

#include "check.h"
#include "dtype.h"

namespace rampde {

class Tensor {
 public:
  explicit Tensor(AtenTensorHandle handle) : handle_(handle) {
    int64_t *sizes, *strides;
    check_shim(aoti_torch_get_dim(handle, &dim_), "read the number of dimensions of a tensor");
    check_shim(aoti_torch_get_sizes(handle, &sizes), "read the shape of a tensor");
    check_shim(aoti_torch_get_strides(handle, &strides), "read the strides of a tensor");
    check_shim(aoti_torch_get_dtype(handle, &dtype_number_), "read the dtype of a tensor");
    sizes_ = sizes;
    strides_ = strides;
  }
  Tensor(Tensor&& other) noexcept
      : handle_(std::exchange(other.handle_, nullptr)),
        dim_(other.dim_),
        sizes_(other.sizes_),
        strides_(other.strides_),
        dtype_number_(other.dtype_number_) {}
  Tensor(const Tensor&) = delete;
  Tensor& operator=(const Tensor&) = delete;
  Tensor& operator=(Tensor&&) = delete;
  ~Tensor() {
    if (handle_ != nullptr) aoti_torch_delete_tensor_object(handle_);
  }

  AtenTensorHandle get() const { return handle_; }
  AtenTensorHandle release() { return std::exchange(handle_, nullptr); }
  int64_t dim() const { return dim_; }
  int64_t size(int64_t i) const { return sizes_[i]; }
  int64_t stride(int64_t i) const { return strides_[i]; }
  int32_t dtype_number() const { return dtype_number_; }
  DType dtype() const { return dtype_of_number(dtype_number_); }

  int64_t numel() const {
    int64_t count = 1;
    for (int64_t i = 0; i < dim_; ++i) count *= sizes_[i];
    return count;
  }
  std::pair<int32_t, int32_t> device() const {
    int32_t type, index;
    check_shim(aoti_torch_get_device_type(handle_, &type), "read the device of a tensor");
    check_shim(aoti_torch_get_device_index(handle_, &index), "read the device of a tensor");
    return {type, index};
  }
  const void* data() const {
    const void* pointer;
    check_shim(torch_get_const_data_ptr(handle_, &pointer), "read the address of a tensor");
    return pointer;
  }
  // copies what is shared copy-on-write, therefore only for tensors that are written
  void* mutable_data() const {
    void* pointer;
    check_shim(torch_get_mutable_data_ptr(handle_, &pointer), "read the address of a tensor");
    return pointer;
  }
  // uninitialised, with the shape, strides and device of this one
  Tensor empty_like(int32_t dtype_number) const {
    return empty(dim_, sizes_, strides_, dtype_number);
  }
  // uninitialised, in row-major order, on the device of this one
  Tensor empty_matrix(int64_t rows, int64_t columns, int32_t dtype_number) const {
    const int64_t sizes[] = {rows, columns}, strides[] = {columns, 1};
    return empty(2, sizes, strides, dtype_number);
  }
  // a copy in row-major order
  Tensor contiguous() const {
    std::vector<int64_t> strides(dim_);
    int64_t stride = 1;
    for (int64_t i = dim_ - 1; i >= 0; --i) {
      strides[i] = stride;
      stride *= sizes_[i];
    }
    Tensor copy = empty(dim_, sizes_, strides.data(), dtype_number_);
    copy.copy_from(*this);
    return copy;
  }
  void copy_from(const Tensor& source) {
    check_shim(aoti_torch_copy_(handle_, source.handle_, /*non_blocking=*/1), "copy a tensor");
  }

 private:
  Tensor empty(int64_t dim, const int64_t* sizes, const int64_t* strides,
               int32_t dtype_number) const {
    const auto [type, index] = device();
    AtenTensorHandle created;
    check_shim(aoti_torch_empty_strided(dim, sizes, strides, dtype_number, type, index, &created),
               "allocate a tensor");
    return Tensor(created);
  }

  AtenTensorHandle handle_;
  int64_t dim_;
  const int64_t* sizes_;
  const int64_t* strides_;
  int32_t dtype_number_;
};

// The shape as text, written only when a message needs it.
struct Shape {
  const Tensor& tensor;
};

inline std::ostream& operator<<(std::ostream& out, const Shape& shape) {
  out << '[';
  for (int64_t i = 0; i < shape.tensor.dim(); ++i)
    out << (i > 0 ? ", " : "") << shape.tensor.size(i);
  return out << ']';
}

using TensorList = std::vector<Tensor>;
using OptionalTensorList = std::vector<std::optional<Tensor>>;

inline bool same_shape(const Tensor& x, const Tensor& y) {
  if (x.dim() != y.dim()) return false;
  for (int64_t i = 0; i < x.dim(); ++i) {
    if (x.size(i) != y.size(i)) return false;
  }
  return true;
}

// whether elements of equal index have equal offsets; shapes are the same already
inline bool same_layout(const Tensor& x, const Tensor& y) {
  for (int64_t i = 0; i < x.dim(); ++i) {
    if (x.stride(i) != y.stride(i) && x.size(i) > 1) return false;
  }
  return true;
}

// whether the elements fill one stretch of memory in row-major order
inline bool is_contiguous(const Tensor& x) {
  int64_t filled = 1;
  int64_t i = x.dim() - 1;
  while (i >= 0 && (x.size(i) == 1 || x.stride(i) == filled)) filled *= x.size(i--);
  return i < 0 || x.numel() == 0;
}

// whether the elements fill one stretch of memory without gap or overlap, in whichever order
inline bool is_dense(const Tensor& x) {
  if (is_contiguous(x)) return true;  // the usual case
  const int64_t count = x.numel();
  int64_t filled = 1;
  while (filled < count) {
    // the next dimension steps over all elements filled so far
    int64_t next = 0;
    while (next < x.dim() && (x.size(next) == 1 || x.stride(next) != filled)) ++next;
    if (next == x.dim()) return false;
    filled *= x.size(next);
  }
  return filled == count;
}

}  // namespace rampde
