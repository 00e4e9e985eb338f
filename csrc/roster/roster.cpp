#include "roster.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <iterator>
#include <optional>
#include <stdexcept>
#include <string>

namespace py = pybind11;

namespace ranger {
namespace {

// float32 counts no further; a step after these counts none (docs/design/contract.md).
constexpr float kMostSteps = 16777216.0f;

constexpr int kMostPasses = 10;

bool is_count(float value) {
  return value >= 0 && value <= kMostSteps && value == std::floor(value);
}

}  // namespace

// --- what is kept alive --------------------------------------------------------------------------

PyObject* Held::keep_new(PyObject* owned) {
  objects_.push_back(owned);
  return owned;
}

void Held::release() {
  // Emptied first: what is freed may run any code, and come here again.
  std::vector<PyObject*> objects;
  objects.swap(objects_);
  for (PyObject* object : objects) Py_DECREF(object);
  objects.clear();
  if (objects_.empty()) objects_.swap(objects);  // its room, for the next step
}

Roster::Use::Use(Roster& roster) : roster_(roster) {
  if (roster.in_use_) throw std::runtime_error("the roster is in use, in another thread or a hook");
  roster.in_use_ = true;
}

// --- a step ------------------------------------------------------------------------------------

Roster::Roster(const py::capsule& exchange_api, const py::sequence& streams, py::str step_name,
               py::object dtensor, py::object plain, py::object plain_grad, py::object shard_of,
               int32_t first_place)
    : exchange_(exchange_api),
      dtensor_(std::move(dtensor)),
      plain_(std::move(plain)),
      plain_grad_(std::move(plain_grad)),
      shard_of_(std::move(shard_of)),
      first_place_(first_place),
      prefetch_(exchange_) {
  if (!PyType_Check(dtensor_.ptr()) ||
      !PyType_IsSubtype(reinterpret_cast<PyTypeObject*>(dtensor_.ptr()), tensor_type())) {
    throw py::type_error("dtensor must be a type of tensors");
  }
  if (first_place < 0) throw py::value_error("first_place counts parameters, from 0");
  if (streams.size() != kNamed - 1) {
    throw py::value_error(
        "streams must be four: the names of exp_avg, exp_avg_sq, slow_param and "
        "outer_momentum_buffer");
  }
  for (int i = 0; i < kNamed - 1; ++i) names_[i] = streams[i];
  names_[kNamed - 1] = std::move(step_name);
  // Of what lies beside a stream that the rule does not have, nobody asks.
  static constexpr const char* kRests[] = {"residual", "master", "exp_avg_scale",
                                           "exp_avg_sq_scale", "slow_residual"};
  for (int i = kNamed; i < kStateNames; ++i) {
    names_[i] = py::reinterpret_borrow<py::object>(interned(kRests[i - kNamed]));
  }
  for (const py::object& name : names_) {
    if (!name.is_none() && !PyUnicode_Check(name.ptr())) {
      throw py::type_error("the name of a state is a string or None");
    }
  }
}

void Roster::serve(const py::object& tensor, const std::string& weight_rounding, int32_t launcher,
                   const std::string& format) {
  DLTensor found;
  const void* cleared = nullptr;
  const auto* const info = std::find_if(std::begin(kFormatInfos), std::end(kFormatInfos),
                                        [&](const FormatInfo& one) { return one.name == format; });
  if (launcher < 0 || info == std::end(kFormatInfos) || !reads(tensor.ptr(), &cleared, &found) ||
      dtype_of(found) != info_of(info->codecs[kParam]).stored) {
    throw py::value_error("serve() takes a real tensor, a launcher's index, and a format for it");
  }
  const auto id = static_cast<FormatId>(info - std::begin(kFormatInfos));
  kinds_.push_back({found.device, *dtype_of(found), weight_rounding, launcher, id});
}

py::list Roster::collect(const py::sequence& param_groups, const py::dict& state,
                         const py::object& moved, bool hold) {
  release();
  const Use use(*this);
  try {
    enlist(param_groups);
    find_movers(moved);
    find_state(state);
    if (hold) hold_memory();
    py::list rest = describe_all();
    settle_shared_memory(rest);
    is_collected_ = true;
    return rest;
  } catch (...) {
    forget();  // what is half compared
    throw;
  }
}

py::list Roster::describe_all() {
  py::list rest;
  // Once more if other code may have run, so that none has in the end; or the memory is held.
  for (int pass = 0; pass == 0 || (python_ran_ && !holds_memory_); ++pass) {
    if (pass == kMostPasses) throw std::runtime_error("tensors change while a step looks at them");
    python_ran_ = false;
    rest = py::list();
    for (size_t i = 0; i < movers_.size(); ++i) {
      if (i + kObjectsAhead < movers_.size()) {
        for (PyObject* item : movers_[i + kObjectsAhead].items) __builtin_prefetch(item);
      }
      if (i + kTensorsAhead < movers_.size()) {
        for (PyObject* item : movers_[i + kTensorsAhead].items) prefetch_.tensor(item);
      }
      if (i + kStoragesAhead < movers_.size()) {
        for (PyObject* item : movers_[i + kStoragesAhead].items) prefetch_.storage(item);
      }
      const Outcome outcome = describe(movers_[i]);
      if (outcome == Outcome::kRow) continue;
      rows_.rows[movers_[i].position].active = false;
      rest.append(py::make_tuple(movers_[i].position, outcome == Outcome::kSharesMemory));
    }
  }
  // Only on the host: nobody waits for a device to look at a count there.
  for (const Mover& mover : movers_) {
    TensorRow& row = rows_.rows[mover.position];
    if (!row.active || row.device_type != kDLCPU || is_count(*row.step)) continue;
    row.active = false;
    rest.append(py::make_tuple(mover.position, false));
  }
  return rest;
}

// Aliases in place of the tensors, before anything is described: they keep the memory that they
// were made of, whatever the tensors are given.
void Roster::hold_memory() {
  static const Attribute alias("data");
  for (Mover& mover : movers_) {
    find_shards(mover);
    for (PyObject*& item : mover.items) {
      if (item == nullptr) continue;
      PyObject* const held = alias.of(item, is_plain_type(item));
      if (held != nullptr) {
        item = held_.keep_new(held);
      } else if (PyErr_ExceptionMatches(PyExc_AttributeError)) {
        PyErr_Clear();  // no tensor: the checks in Python say so
      } else {
        throw py::error_already_set();
      }
    }
  }
  holds_memory_ = true;
}

int64_t Roster::next_version() {
  static std::atomic<int64_t> last{0};
  return ++last;
}

void Roster::forget() {
  members_.clear();
  state_entries_.clear();
  states_.clear();
  movers_.clear();
  mover_of_.clear();
  rows_.rows.clear();
  rows_.version = next_version();
}

void Roster::release() {
  if (in_use_) throw std::runtime_error("the roster is in use, in another thread or a hook");
  for (const Mover& mover : movers_) rows_.rows[mover.position].active = false;
  movers_.clear();
  states_.clear();
  is_collected_ = false;
  holds_memory_ = false;
  held_.release();
}

// --- memory that is shared -----------------------------------------------------------------------

// In parallel, kernels would race for it: such parameters move one after the other, in Python.
void Roster::settle_shared_memory(py::list& rest) {
  if (!written_.may_be_shared(rows_, reads_gradients_)) return;
  for (int32_t position : sharing_memory(active_spans(rows_, reads_gradients_))) {
    rows_.rows[position].active = false;
    rest.append(py::make_tuple(position, true));
  }
}

py::list Roster::leave_out(const py::sequence& tensors) {
  const Use use(*this);
  std::vector<Span> spans = active_spans(rows_, reads_gradients_);
  const size_t its = spans.size();
  for (py::handle tensor : tensors) {
    DLTensor found;
    if (!exchange_.describe(tensor.ptr(), &found) || data_of(found) == nullptr) continue;
    const Shape shape = shape_of(found);
    if (count_elements(shape) == 0) continue;
    int64_t last = 0;
    for (int32_t dim = 0; dim < shape.ndim; ++dim) {
      last += (shape.sizes[dim] - 1) * shape.strides[dim];
    }
    const auto begin = reinterpret_cast<uintptr_t>(data_of(found));
    const auto bytes = static_cast<uintptr_t>((last + 1) * found.dtype.bits / 8);
    spans.push_back({begin, begin + bytes, kNoRow, true});
  }
  py::list left;
  if (its == 0 || its == spans.size()) return left;
  for (int32_t position : sharing_memory(std::move(spans))) {
    rows_.rows[position].active = false;
    left.append(position);
  }
  return left;
}

// --- swaps ---------------------------------------------------------------------------------------

py::list Roster::pair(const py::sequence& params, const py::sequence& slow_params) {
  const py::tuple first(as_tuple(params.ptr()));
  const py::tuple second(as_tuple(slow_params.ptr()));
  if (first.size() != second.size()) {
    throw py::value_error("as many parameters as slow weights make pairs");
  }
  release();
  const Use use(*this);
  forget();
  reads_gradients_ = false;
  rows_.rows.assign(first.size(), TensorRow());
  for (size_t i = 0; i < first.size(); ++i) {
    Mover mover = {static_cast<int32_t>(i), held_.keep(first[i].ptr()), {}, {}, {}, false};
    mover.items[kParam] = mover.param;
    mover.items[kSlowParam] = held_.keep(second[i].ptr());
    movers_.push_back(mover);
  }
  hold_memory();
  py::list rest;
  for (Mover& mover : movers_) {
    Described found;
    const auto sees = [&](Stream stream) {
      return reads(mover.items[stream], &mover.cleared[stream], &found[stream]);
    };
    const bool is_row =
        sees(kParam) && sees(kSlowParam) && enter(mover, found, true) == Outcome::kRow;
    if (!is_row) rest.append(mover.position);
  }
  if (written_.may_be_shared(rows_, false)) {
    for (int32_t position : sharing_memory(active_spans(rows_, false))) {
      rows_.rows[position] = TensorRow();
      rest.append(position);
    }
    rows_.version = next_version();
  }
  is_collected_ = true;
  return rest;
}

py::list Roster::moved() const {
  py::list params;
  for (const Mover& mover : movers_) {
    if (rows_.rows[mover.position].active) params.append(py::handle(mover.param));
  }
  return params;
}

}  // namespace ranger
