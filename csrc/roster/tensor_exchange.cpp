#include "tensor_exchange.h"

#include <algorithm>
#include <string>

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

bool TensorExchange::describe(PyObject* tensor, DLTensor* description) const {
  if (api_->dltensor_from_py_object_no_sync(tensor, description) == 0) return true;
  PyErr_Clear();
  return false;
}

void* TensorExchange::current_stream(int32_t device) const {
#if defined(RANGER_EMULATE_CUDA)
  static_cast<void>(device);  // a torch without a GPU has none to ask for
  return nullptr;
#else
  void* stream = nullptr;
  if (api_->current_work_stream(kDLCUDA, device, &stream) != 0) throw py::error_already_set();
  return stream;
#endif
}

std::optional<DType> dtype_of(const DLTensor& tensor) {
  const DLDataType& dtype = tensor.dtype;
  if (dtype.lanes != 1) return std::nullopt;
  if (dtype.code == kDLBfloat && dtype.bits == 16) return DType::kBFloat16;
  if (dtype.code == kDLInt && dtype.bits == 8) return DType::kInt8;
  if (dtype.code == kDLUInt && dtype.bits == 8) return DType::kUInt8;
  if (dtype.code != kDLFloat) return std::nullopt;
  if (dtype.bits == 16) return DType::kFloat16;
  if (dtype.bits == 32) return DType::kFloat32;
  if (dtype.bits == 64) return DType::kFloat64;
  return std::nullopt;
}

bool same_device(const DLTensor& a, const DLTensor& b) {
  return a.device.device_type == b.device.device_type && a.device.device_id == b.device.device_id;
}

bool same_sizes(const DLTensor& a, const DLTensor& b) {
  return a.ndim == b.ndim && std::equal(a.shape, a.shape + a.ndim, b.shape);
}

}  // namespace ranger
