// Tensors as Python holds them: what DLPack does not tell about them, and where in memory torch
// keeps what it does tell.
#pragma once

#include <pybind11/pybind11.h>

#include "tensor_exchange.h"

namespace ranger {

// The object, or the error that Python has in its place.
PyObject* checked(PyObject* object);

pybind11::object take(PyObject* owned);

// What code that runs meanwhile does not change.
pybind11::object as_tuple(PyObject* object);

// A borrowed name, made once and never freed.
PyObject* interned(const char* name);

PyTypeObject* tensor_type();

// A tensor or a parameter, and of no subclass.
bool is_plain_type(PyObject* object);

// An attribute of tensors. Of types that do not replace it, `direct`, its getter is called: half
// the time of a look-up.
class Attribute {
 public:
  explicit Attribute(const char* name);

  // A new reference; nullptr with an error set.
  PyObject* of(PyObject* tensor, bool direct) const;

 private:
  PyObject* name_;
  PyGetSetDescrObject* getter_ = nullptr;
};

// Whether the kernels can read a tensor of this description as it is. That it is real, its values
// not lazily negated and its memory there is asked of torch, which may let other code run, where
// the description leaves it open.
enum class Look { kYes, kNo, kAsk };
Look look(const DLTensor& described);
bool ask(PyObject* tensor, const DLTensor& described);

// Most of a description's time is three waits for memory, one behind the other: for Python's
// object, for torch's tensor, which one of the object's first words points to, and for its storage,
// which one of the tensor's does.
//
// Each is asked for while rows are looked at that come so many earlier.
constexpr size_t kObjectsAhead = 8;
constexpr size_t kTensorsAhead = 5;
constexpr size_t kStoragesAhead = 2;

class Prefetcher {
 public:
  explicit Prefetcher(const TensorExchange& exchange);

  void tensor(PyObject* object) const;
  void storage(PyObject* object) const;

 private:
  const char* const* tensor_of(PyObject* object) const;

  int word_ = -1;  // of the object; -1: not found in this version of torch
};

}  // namespace ranger
