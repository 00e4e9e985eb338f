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

bool fits(const DLTensor& param, const DLTensor& tensor) {
  return same_device(param, tensor) && same_sizes(param, tensor);
}

// Whether the kernels can read it as that parameter's.
bool is_gradient(const DLTensor& param, const DLTensor& grad) {
  return fits(param, grad) && static_cast<int>(*dtype_of(grad)) < kGradDTypes;
}

// Whether they differ in no more than where the gradient is.
bool same_but_gradient(const TensorRow& a, const TensorRow& b) {
  for (int tensor = 0; tensor < kTensors; ++tensor) {
    if (tensor != kGrad && a.data[tensor] != b.data[tensor]) return false;
  }
  const bool same_layout = a.layout == b.layout || (a.layout && b.layout && *a.layout == *b.layout);
  return a.step == b.step && a.numel == b.numel && a.first == b.first && a.place == b.place &&
         a.group == b.group && a.launcher == b.launcher && a.device_type == b.device_type &&
         a.format == b.format && a.grad_dtype == b.grad_dtype && same_layout;
}

// Whether the row's format has such a tensor, of a stream that the rule has.
template <class Mover>
bool belongs(const TensorRow& row, const Mover& mover, int tensor) {
  if (mover.items[tensor] == nullptr) return false;
  return tensor < kRestOf ||
         (mover.items[tensor - kRestOf] != nullptr && tensor != kRestOf + kGrad &&
          codec_of(row, tensor - kRestOf).has_rest());
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
               py::object dtensor, py::object plain, py::object plain_grad, py::object first_of)
    : exchange_(exchange_api),
      dtensor_(std::move(dtensor)),
      plain_(std::move(plain)),
      plain_grad_(std::move(plain_grad)),
      first_of_(std::move(first_of)),
      prefetch_(exchange_) {
  if (!PyType_Check(dtensor_.ptr()) ||
      !PyType_IsSubtype(reinterpret_cast<PyTypeObject*>(dtensor_.ptr()), tensor_type())) {
    throw py::type_error("dtensor must be a type of tensors");
  }
  if (streams.size() != kNamed - 1) {
    throw py::value_error("streams must be three: the names of exp_avg, exp_avg_sq and slow_param");
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

// `is_pair`: what lies beside parameter and slow weight does not matter.
const Roster::Kind* Roster::kind_of(const Mover& mover, const Described& found,
                                    bool is_pair) const {
  const DLTensor& param = found[kParam];
  const std::optional<DType> dtype = dtype_of(param);
  for (const Kind& kind : kinds_) {
    if (kind.device.device_type != param.device.device_type ||
        kind.device.device_id != param.device.device_id || kind.dtype != dtype) {
      continue;
    }
    const FormatInfo& format = info_of(kind.format);
    if (is_pair) {
      if (info_of(format.codecs[kSlowParam]).stored == dtype) return &kind;
      continue;
    }
    const std::string& asked = weight_roundings_[members_[mover.position].group];
    if (!kind.weight_rounding.empty() && kind.weight_rounding != asked) continue;
    if (has_state(mover, found, format)) return &kind;
  }
  return nullptr;
}

// Whether there is all that the format has of the rule's streams, in its dtypes. What else there is
// does not matter.
bool Roster::has_state(const Mover& mover, const Described& found, const FormatInfo& format) const {
  for (int stream = 0; stream < kStreams; ++stream) {
    if (stream == kGrad || mover.items[stream] == nullptr) continue;
    const CodecInfo& codec = info_of(format.codecs[stream]);
    if (dtype_of(found[stream]) != codec.stored) return false;
    if (!codec.has_rest()) continue;
    const int rest = kRestOf + stream;
    if (mover.items[rest] == nullptr || dtype_of(found[rest]) != codec.rest) return false;
  }
  return true;
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

// --- describing ----------------------------------------------------------------------------------

// What DLPack does not tell is asked of the tensor, which may let other code run: once for the
// memory that it has, `cleared`.
bool Roster::reads(PyObject* tensor, const void** cleared, DLTensor* found) {
  if (!exchange_.describe(tensor, found)) return false;
  const Look seen = look(*found);
  if (seen != Look::kAsk || (*cleared != nullptr && *cleared == data_of(*found))) {
    return seen != Look::kNo;
  }
  python_ran_ = true;
  if (!ask(tensor, *found) || !exchange_.describe(tensor, found)) return false;
  *cleared = data_of(*found);
  return true;
}

// Puts in place of an item that DLPack does not describe as the kernels need it a real tensor of
// its memory, or a copy of a gradient. That is Python's, and lets other threads run.
bool Roster::resolve(Mover& mover, int item) {
  python_ran_ = true;
  mover.is_resolved[item] = true;
  try {
    const py::object found = item == kGrad ? plain_grad_(py::handle(mover.param))
                                           : plain_(py::handle(mover.items[item]));
    mover.items[item] = held_.keep(found.ptr());
  } catch (py::error_already_set& error) {
    if (!error.matches(PyExc_Exception)) throw;
    return false;  // the checks in Python say what is wrong
  }
  return true;
}

// In place of DTensors their shards, but for those still on their way. A gradient's only where it
// is laid out as its parameter's is for sure.
void Roster::find_shards(Mover& mover) {
  static PyObject* const kLocal = interned("_local_tensor");
  static PyObject* const kSpec = interned("_spec");
  for (int item = 0; item < kItems; ++item) {
    PyObject* const whole = mover.items[item];
    if (whole == nullptr || !is_dtensor(whole)) continue;
    if (item == kGrad) {
      if (!is_dtensor(mover.param)) continue;
      const auto its = py::reinterpret_steal<py::object>(PyObject_GetAttr(whole, kSpec));
      const auto of_param = py::reinterpret_steal<py::object>(PyObject_GetAttr(mover.param, kSpec));
      if (!its || !its.is(of_param)) {
        PyErr_Clear();
        continue;
      }
    }
    PyObject* const shard = PyObject_GetAttr(whole, kLocal);
    if (shard == nullptr) {
      PyErr_Clear();
      continue;
    }
    held_.keep_new(shard);
    if (is_plain_type(shard)) mover.items[item] = shard;
  }
}

bool Roster::look_at_all(Mover& mover, Described& found) {
  find_shards(mover);
  for (int item = 0; item < kItems; ++item) {
    if (mover.items[item] == nullptr) continue;
    const bool seen = reads(mover.items[item], &mover.cleared[item], &found[item]) &&
                      (item != kGrad || is_gradient(found[kParam], found[kGrad]));
    if (seen) continue;
    if (mover.is_resolved[item] || !resolve(mover, item)) {
      if (item < kRestOf || item == kStep) return false;
      mover.items[item] = nullptr;  // as if it were not there: the format may not need it
      continue;
    }
    mover.cleared[item] = nullptr;
    item = -1;  // from the start
  }
  return true;
}

Roster::Outcome Roster::describe(Mover& mover) {
  for (int i = 0; i < kNamed; ++i) {
    if (!names_[i].is_none() && mover.items[kItemOf[i]] == nullptr) return Outcome::kNeedsPython;
  }
  Described found;
  if (mover.is_refused || !look_at_all(mover, found)) {
    mover.is_refused = true;  // in a later pass, too
    return Outcome::kNeedsPython;
  }
  const DLTensor& step = found[kStep];
  if (!same_device(step, found[kParam]) || dtype_of(step) != DType::kFloat32 || step.ndim != 0) {
    return Outcome::kNeedsPython;
  }
  return enter(mover, found, false);
}

// Elements count from the first of the whole parameter. Asked for once, unless it is sharded anew.
int64_t Roster::first_of(const Mover& mover) {
  static PyObject* const kSpec = interned("_spec");
  Member& member = members_[mover.position];
  if (!is_dtensor(member.param)) return 0;
  const py::object spec = take(PyObject_GetAttr(member.param, kSpec));
  if (!spec.is(member.spec)) {
    python_ran_ = true;
    member.first = first_of_(py::handle(member.param)).cast<int64_t>();
    member.spec = spec;
  }
  return member.first;
}

Roster::Outcome Roster::enter(const Mover& mover, const Described& found, bool is_pair) {
  const DLTensor& param = found[kParam];
  const Shape shape = shape_of(param);
  TensorRow next;
  const Kind* const kind = kind_of(mover, found, is_pair);
  if (kind == nullptr) return Outcome::kNeedsPython;
  next.launcher = kind->launcher;
  next.format = kind->format;
  next.device_type = static_cast<int8_t>(param.device.device_type);
  if (mover.items[kGrad] != nullptr) next.grad_dtype = dtype_of(found[kGrad]).value();
  next.numel = count_elements(shape);
  next.place = mover.position;
  next.group = members_.empty() ? 0 : members_[mover.position].group;
  next.active = true;
  if (mover.items[kStep] != nullptr) next.step = static_cast<float*>(data_of(found[kStep]));
  if (next.device_type == kDLCPU) __builtin_prefetch(next.step);
  const bool counts_elements = info_of(next.format).counts_elements();
  if (counts_elements && !is_pair) next.first = first_of(mover);
  bool consecutive = true;
  for (int tensor = 0; tensor < kTensors; ++tensor) {
    if (!belongs(next, mover, tensor)) continue;
    const Shape its = shape_of(found[tensor]);
    if (is_grouped(next, tensor)) {
      const int64_t groups = (next.numel + kGroup - 1) / kGroup;
      if (!same_device(param, found[tensor]) || count_elements(its) != groups ||
          !is_row_major(its)) {
        return Outcome::kNeedsPython;
      }
    } else if (!fits(param, found[tensor])) {
      return Outcome::kNeedsPython;
    } else {
      consecutive = consecutive && (next.numel == 0 || is_row_major(its));
    }
    next.data[tensor] = data_of(found[tensor]);
  }
  if (!consecutive) {
    const std::vector<int32_t> order =
        counts_elements && !is_pair ? row_major_order(shape) : memory_order(shape);
    auto layout = std::make_shared<Layout>();
    layout->sizes = ordered_sizes(shape, order);
    bool strided = false;
    for (int tensor = 0; tensor < kTensors; ++tensor) {
      if (next.data[tensor] == nullptr || is_grouped(next, tensor)) continue;
      const Shape its = shape_of(found[tensor]);
      if (tensor != kGrad && !is_disjoint(its)) return Outcome::kSharesMemory;
      layout->strides[tensor] = ordered_strides(its, order);
      strided = strided || !layout->strides[tensor].empty();
    }
    if (strided) next.layout = std::move(layout);
  }
  TensorRow& row = rows_.rows[mover.position];
  if (same_but_gradient(row, next)) {
    row.data[kGrad] = next.data[kGrad];
    row.active = true;
  } else {
    row = std::move(next);
    rows_.version = next_version();
  }
  return Outcome::kRow;
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
