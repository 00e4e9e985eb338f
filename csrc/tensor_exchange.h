// Tensors come in through the DLPack C exchange API (torch >= 2.10): pointer, dtype, shape, strides
// and device, with no copy and without linking libtorch.
#pragma once

#include <dlpack/dlpack.h>
#include <pybind11/pybind11.h>

#include <optional>
#include <vector>

#include "plan.h"

namespace ranger {

class TensorExchange {
 public:
  // `capsule`: torch.Tensor.__dlpack_c_exchange_api__.
  explicit TensorExchange(const pybind11::capsule& capsule);

  // The tensor's description, valid until the tensor is changed; throws what torch raised if it has
  // no memory (sparse, meta, ...). Lazy negation and conjugation are NOT in it: ask the tensor.
  DLTensor describe(PyObject* tensor) const;

  // The same without throwing: false if there is nothing to describe.
  bool try_describe(PyObject* tensor, DLTensor* description) const;

  // The stream that torch works on now, on this CUDA device.
  void* current_stream(int32_t device) const;

 private:
  const DLPackExchangeAPI* api_;
};

inline void* data_of(const DLTensor& tensor) {
  return static_cast<char*>(tensor.data) + tensor.byte_offset;
}

inline Layout layout_of(const DLTensor& tensor) {
  return {tensor.ndim, tensor.shape, tensor.strides};
}

// The kernels' dtype of a real floating tensor, if there is one.
std::optional<DType> dtype_of(const DLTensor& tensor);

// What a tensor was when the plan was made. A pointer alone is never a key: memory is used again
// with other sizes.
class TensorKey {
 public:
  TensorKey() = default;
  explicit TensorKey(const DLTensor& tensor);

  // Same memory, dtype, device, shape and strides.
  bool matches(const DLTensor& tensor) const {
    return data_of(tensor) == data_ && same_kind(tensor) && same_layout(tensor);
  }
  bool same_device(const DLTensor& tensor) const {
    return tensor.device.device_type == device_.device_type &&
           tensor.device.device_id == device_.device_id;
  }
  // All of that but the memory.
  bool same_kind(const DLTensor& tensor) const;
  bool same_layout(const DLTensor& tensor) const;
  bool same_shape(const DLTensor& tensor) const;

 private:
  void* data_ = nullptr;
  DLDataType dtype_ = {};
  DLDevice device_ = {};
  std::vector<int64_t> shape_and_strides_;
};

}  // namespace ranger
