#include "python_tensors.h"

#include <cstdint>

namespace py = pybind11;

namespace ranger {
namespace {

PyObject* torch_attribute(const char* module, const char* name) {
  return py::object(py::module_::import(module).attr(name)).release().ptr();
}

PyTypeObject* parameter_type() {
  static PyObject* const type = torch_attribute("torch.nn", "Parameter");
  return reinterpret_cast<PyTypeObject*>(type);
}

// One that stands for the negative of its memory is the imaginary part of a complex tensor: no two
// of its elements are neighbours, and a single one starts at an odd multiple of its size.
bool may_be_negated(const DLTensor& described) {
  const uintptr_t item = described.dtype.bits / 8;
  bool is_single = true;
  for (int32_t dim = 0; dim < described.ndim; ++dim) {
    if (described.shape[dim] == 1) continue;
    if (described.strides[dim] == 1) return false;
    is_single = false;
  }
  return !is_single || reinterpret_cast<uintptr_t>(data_of(described)) % (2 * item) == item;
}

bool is_negated(PyObject* tensor) {
  static PyObject* const name = interned("is_neg");
  return take(PyObject_CallMethodNoArgs(tensor, name)).ptr() == Py_True;
}

// A storage that was given back lies at nullptr, so the address is then the tensor's offset in it:
// below all that a storage can hold.
bool may_be_unallocated(const DLTensor& described) {
  constexpr uintptr_t kLargestStorage = uintptr_t{1} << 40;
  return reinterpret_cast<uintptr_t>(data_of(described)) < kLargestStorage;
}

// Where memory really is as low as that, the offset tells.
bool is_unallocated(PyObject* tensor, const DLTensor& described) {
  static PyObject* const name = interned("storage_offset");
  const auto address = reinterpret_cast<uintptr_t>(data_of(described));
  if (address == 0) return true;
  const py::object offset = take(PyObject_CallMethodNoArgs(tensor, name));
  return offset.cast<uintptr_t>() * (described.dtype.bits / 8) == address;
}

}  // namespace

PyObject* checked(PyObject* object) {
  if (object == nullptr) throw py::error_already_set();
  return object;
}

py::object take(PyObject* owned) { return py::reinterpret_steal<py::object>(checked(owned)); }

py::object as_tuple(PyObject* object) { return take(PySequence_Tuple(object)); }

PyObject* interned(const char* name) { return checked(PyUnicode_InternFromString(name)); }

PyTypeObject* tensor_type() {
  static PyObject* const type = torch_attribute("torch", "Tensor");
  return reinterpret_cast<PyTypeObject*>(type);
}

bool is_plain_type(PyObject* object) {
  return Py_TYPE(object) == tensor_type() || Py_TYPE(object) == parameter_type();
}

Attribute::Attribute(const char* name) : name_(interned(name)) {
  PyObject* const found =
      checked(PyObject_GetAttr(reinterpret_cast<PyObject*>(tensor_type()), name_));
  if (Py_TYPE(found) == &PyGetSetDescr_Type)
    getter_ = reinterpret_cast<PyGetSetDescrObject*>(found);
}

PyObject* Attribute::of(PyObject* tensor, bool direct) const {
  if (!direct || getter_ == nullptr) return PyObject_GetAttr(tensor, name_);
  return getter_->d_getset->get(tensor, getter_->d_getset->closure);
}

Look look(const DLTensor& described) {
  if (!dtype_of(described)) return Look::kNo;
  if (count_elements(shape_of(described)) == 0) return Look::kYes;
  return may_be_unallocated(described) || may_be_negated(described) ? Look::kAsk : Look::kYes;
}

bool ask(PyObject* tensor, const DLTensor& described) {
  if (may_be_unallocated(described) && is_unallocated(tensor, described)) return false;
  return !(may_be_negated(described) && is_negated(tensor));
}

// Which word it is depends on torch's version: the one behind which a tensor's sizes lie.
Prefetcher::Prefetcher(const TensorExchange& exchange) {
  const py::object tensor = py::module_::import("torch").attr("empty")(1);
  DLTensor found;
  if (Py_TYPE(tensor.ptr()) != tensor_type() || !exchange.describe(tensor.ptr(), &found)) return;
  const auto* const words = reinterpret_cast<const uintptr_t*>(tensor.ptr() + 1);
  const auto sizes = reinterpret_cast<uintptr_t>(found.shape);
  for (int word = 0; word < 2 && word_ < 0; ++word) {
    const auto end = static_cast<Py_ssize_t>(sizeof(PyObject) + (word + 1) * sizeof(void*));
    if (end > tensor_type()->tp_basicsize) return;
    if (words[word] < sizes && sizes < words[word] + 512) word_ = word;
  }
}

const char* const* Prefetcher::tensor_of(PyObject* object) const {
  if (object == nullptr || word_ < 0 || !is_plain_type(object)) return nullptr;
  return reinterpret_cast<const char* const* const*>(object + 1)[word_];
}

void Prefetcher::tensor(PyObject* object) const {
  const char* const* const tensor = tensor_of(object);
  for (int line = 0; line < 4; ++line) __builtin_prefetch(tensor + 8 * line);
}

void Prefetcher::storage(PyObject* object) const {
  const char* const* const tensor = tensor_of(object);
  if (tensor == nullptr) return;
  for (int i = 2; i < 4; ++i) __builtin_prefetch(tensor[i]);  // behind vtable and counts
}

}  // namespace ranger
