// How a mover's tensors are described, and become a row.
#include <algorithm>
#include <memory>
#include <optional>
#include <tuple>

#include "roster.h"

namespace py = pybind11;

namespace ranger {
namespace {

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
  return a.step == b.step && a.numel == b.numel && a.first == b.first && a.slice == b.slice &&
         a.place == b.place && a.group == b.group && a.launcher == b.launcher &&
         a.device_type == b.device_type && a.format == b.format && a.grad_dtype == b.grad_dtype &&
         same_layout;
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

// --- what it is stored as
// --------------------------------------------------------------------------

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

// --- what its tensors are
// --------------------------------------------------------------------------

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
  const bool has_outer_momentum = have_outer_momentum_[members_[mover.position].group];
  if (!has_outer_momentum) mover.items[kOuterMomentumBuffer] = nullptr;
  for (int i = 0; i < kNamed; ++i) {
    const int item = kItemOf[i];
    const bool is_needed =
        !names_[i].is_none() && (item != kOuterMomentumBuffer || has_outer_momentum);
    if (is_needed && mover.items[item] == nullptr) return Outcome::kNeedsPython;
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

// Of a DTensor. Asked for once, unless it is sharded anew.
const Roster::Member& Roster::shard_of(const Mover& mover) {
  static PyObject* const kSpec = interned("_spec");
  Member& member = members_[mover.position];
  if (!is_dtensor(member.param)) return member;
  const py::object spec = take(PyObject_GetAttr(member.param, kSpec));
  if (!spec.is(member.spec)) {
    python_ran_ = true;
    std::tie(member.first, member.has_whole_slices, member.ndim) =
        shard_of_(py::handle(member.param)).cast<std::tuple<int64_t, bool, int32_t>>();
    member.spec = spec;
  }
  return member;
}

// How many elements share a mean that their gradients are centralized by; 0: none do. False: that
// cannot be, of a complex parameter, one that FullyShardedDataParallel has flattened, or a shard
// that cuts slices.
bool Roster::find_slice(const Mover& mover, const Shape& shape, int64_t& slice) {
  static PyObject* const kFlattened = interned("_fsdp_flattened");
  const int32_t dims = centralized_dims_[members_[mover.position].group];
  if (dims == 0 || !reads_gradients_) return true;
  const Member& member = shard_of(mover);
  int32_t ndim = member.ndim;
  if (!is_dtensor(member.param)) {
    if (PyObject_HasAttr(member.param, kFlattened)) return false;
    DLTensor found;
    ndim = exchange_.describe(member.param, &found) ? found.ndim : shape.ndim;
  }
  if (ndim < dims) return true;
  const int64_t numel = count_elements(shape);
  if (numel > 0) slice = numel / shape.sizes[0];
  return ndim == shape.ndim && member.has_whole_slices;  // pairs have a dimension more
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
  next.place = first_place_ + mover.position;
  next.group = members_.empty() ? 0 : members_[mover.position].group;
  next.active = true;
  if (mover.items[kStep] != nullptr) next.step = static_cast<float*>(data_of(found[kStep]));
  if (next.device_type == kDLCPU) __builtin_prefetch(next.step);
  const bool counts_elements = info_of(next.format).counts_elements();
  if (counts_elements && !is_pair) next.first = shard_of(mover).first;
  if (!is_pair && !find_slice(mover, shape, next.slice)) return Outcome::kNeedsPython;
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
    std::vector<int32_t> order =
        counts_elements && !is_pair ? row_major_order(shape) : memory_order(shape);
    const auto first = std::find(order.begin(), order.end(), 0);
    if (next.slice != 0 && first != order.end()) std::rotate(order.begin(), first, first + 1);
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

}  // namespace ranger
