#include "tensor_exchange.h"

#include <algorithm>

namespace py = pybind11;

namespace ranger {

TensorExchange::TensorExchange(const py::capsule& capsule)
    : api_(static_cast<const DLPackExchangeAPI*>(
          PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"))) {
  if (api_ == nullptr) throw py::error_already_set();
  // A newer major version lays the struct out otherwise; it may carry an older one along.
  const DLPackExchangeAPIHeader* header = &api_->header;
  while (header != nullptr && header->version.major > DLPACK_MAJOR_VERSION) {
    header = header->prev_api;
  }
  api_ = reinterpret_cast<const DLPackExchangeAPI*>(header);
  if (api_ == nullptr || header->version.major != DLPACK_MAJOR_VERSION ||
      api_->dltensor_from_py_object_no_sync == nullptr) {
    throw py::import_error("this torch's DLPack C exchange API is not version " +
                           std::to_string(DLPACK_MAJOR_VERSION) +
                           ", which this extension was built for; update ranger_cuda");
  }
}

DLTensor TensorExchange::describe(PyObject* tensor) const {
  DLTensor description;
  if (api_->dltensor_from_py_object_no_sync(tensor, &description) != 0) {
    throw py::error_already_set();
  }
  return description;
}

bool TensorExchange::try_describe(PyObject* tensor, DLTensor* description) const {
  if (api_->dltensor_from_py_object_no_sync(tensor, description) == 0) return true;
  PyErr_Clear();
  return false;
}

void* TensorExchange::current_stream(int32_t device) const {
  void* stream = nullptr;
  if (api_->current_work_stream(kDLCUDA, device, &stream) != 0) throw py::error_already_set();
  return stream;
}

std::optional<DType> dtype_of(const DLTensor& tensor) {
  if (tensor.dtype.code != kDLFloat || tensor.dtype.lanes != 1) return std::nullopt;
  if (tensor.dtype.bits == 32) return DType::kFloat32;
  if (tensor.dtype.bits == 64) return DType::kFloat64;
  return std::nullopt;
}

TensorKey::TensorKey(const DLTensor& tensor)
    : data_(data_of(tensor)),
      dtype_(tensor.dtype),
      device_(tensor.device),
      shape_and_strides_(tensor.shape, tensor.shape + tensor.ndim) {
  shape_and_strides_.insert(shape_and_strides_.end(), tensor.strides, tensor.strides + tensor.ndim);
}

bool TensorKey::same_kind(const DLTensor& tensor) const {
  return tensor.dtype.code == dtype_.code && tensor.dtype.bits == dtype_.bits &&
         same_device(tensor);
}

bool TensorKey::same_shape(const DLTensor& tensor) const {
  return static_cast<size_t>(tensor.ndim) * 2 == shape_and_strides_.size() &&
         std::equal(tensor.shape, tensor.shape + tensor.ndim, shape_and_strides_.begin());
}

bool TensorKey::same_layout(const DLTensor& tensor) const {
  return same_shape(tensor) && std::equal(tensor.strides, tensor.strides + tensor.ndim,
                                          shape_and_strides_.begin() + tensor.ndim);
}

}  // namespace ranger
