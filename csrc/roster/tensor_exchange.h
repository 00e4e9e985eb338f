// Tensors come in through the DLPack C exchange API (torch >= 2.10): pointer, dtype, shape, strides
// and device, with no copy and without linking libtorch.
#pragma once

#include <dlpack/dlpack.h>
#include <pybind11/pybind11.h>

#include <optional>

#include "../formats/rows.h"

namespace ranger {

class TensorExchange {
 public:
  // `capsule`: torch.Tensor.__dlpack_c_exchange_api__.
  explicit TensorExchange(const pybind11::capsule& capsule);

  // The tensor's description, valid until the tensor is changed; false if it has none (sparse,
  // meta,
  // ...). Lazy negation and conjugation are NOT in it, nor whether its storage holds any memory.
  bool describe(PyObject* tensor, DLTensor* description) const;

  // The stream that torch works on now, on this CUDA device.
  void* current_stream(int32_t device) const;

 private:
  const DLPackExchangeAPI* api_;
};

inline void* data_of(const DLTensor& tensor) {
  return static_cast<char*>(tensor.data) + tensor.byte_offset;
}

inline Shape shape_of(const DLTensor& tensor) {
  return {tensor.ndim, tensor.shape, tensor.strides};
}

// The kernels' dtype of a real floating tensor, if there is one.
std::optional<DType> dtype_of(const DLTensor& tensor);

bool same_device(const DLTensor& a, const DLTensor& b);
bool same_sizes(const DLTensor& a, const DLTensor& b);

}  // namespace ranger
