// The first half of a roster's step: what moves, and the tensors that belong to it.
#include <algorithm>
#include <unordered_map>
#include <unordered_set>

#include "roster.h"

namespace py = pybind11;

namespace ranger {
namespace {

// A list or a tuple as it is, anything else as a list.
py::object as_array(PyObject* object, const char* what) {
  PyObject* array = PySequence_Fast(object, what);
  return py::reinterpret_steal<py::object>(checked(array));
}

bool same_name(PyObject* a, PyObject* b) {
  return a == b || (PyUnicode_Check(a) && PyUnicode_Compare(a, b) == 0);
}

}  // namespace

void Roster::enlist(const py::sequence& param_groups) {
  static PyObject* const kParams = interned("params");
  static PyObject* const kRounding = interned("weight_rounding");
  static PyObject* const kOuterMomentum = interned("outer_momentum");
  static PyObject* const kCentralize = interned("centralize");
  const py::object groups = as_tuple(param_groups.ptr());
  group_count_ = static_cast<int32_t>(PyTuple_GET_SIZE(groups.ptr()));
  weight_roundings_.assign(group_count_, std::string());
  have_outer_momentum_.assign(group_count_, false);
  const std::vector<int32_t> dims_before = std::move(centralized_dims_);
  centralized_dims_.assign(group_count_, 0);
  bool same = true;
  size_t at = 0;
  for (int32_t group = 0; group < group_count_; ++group) {
    PyObject* const options = PyTuple_GET_ITEM(groups.ptr(), group);
    if (!PyDict_Check(options)) throw py::type_error("a parameter group must be a dict");
    PyObject* const named = PyDict_GetItemWithError(options, kParams);
    if (named == nullptr) throw py::key_error("params");
    PyObject* const rounding = PyDict_GetItemWithError(options, kRounding);
    if (rounding != nullptr && PyUnicode_Check(rounding)) {
      weight_roundings_[group] = py::handle(rounding).cast<std::string>();
    }
    PyObject* const momentum = PyDict_GetItemWithError(options, kOuterMomentum);
    if (momentum != nullptr) {
      const int has = PyObject_IsTrue(momentum);
      if (has < 0) throw py::error_already_set();
      have_outer_momentum_[group] = has != 0;
    }
    PyObject* const centralize = PyDict_GetItemWithError(options, kCentralize);
    if (centralize != nullptr && PyUnicode_Check(centralize)) {
      const bool all = PyUnicode_CompareWithASCIIString(centralize, "all") == 0;
      centralized_dims_[group] = all ? 2 : 4;  // "conv": of the weights of convolutions
    }
    const py::object params = as_array(named, "a group's params must be a list");
    for (int32_t i = 0; i < PySequence_Fast_GET_SIZE(params.ptr()); ++i, ++at) {
      PyObject* const param = held_.keep(PySequence_Fast_GET_ITEM(params.ptr(), i));
      if (at == members_.size()) members_.push_back({nullptr, 0, false, {}, 0, true, 0});
      Member& member = members_[at];
      if (member.param == param && member.group == group) continue;
      member = {param, group, false, {}, 0, true, 0};
      same = false;
    }
  }
  if (same && at == members_.size() && rows_.rows.size() == at) {
    if (centralized_dims_ != dims_before) forget_slices();
    return;
  }
  members_.resize(at);
  std::unordered_set<PyObject*> seen;
  for (Member& member : members_) member.again = !seen.insert(member.param).second;
  state_entries_.clear();
  rows_.rows.assign(members_.size(), TensorRow());
  rows_.version = next_version();
}

// Of rows that may rest in this step, and need no memory for what their group no longer does.
void Roster::forget_slices() {
  for (TensorRow& row : rows_.rows) {
    if (row.slice == 0 || centralized_dims_[row.group] != 0) continue;
    row.slice = 0;
    rows_.version = next_version();
  }
}

void Roster::find_movers(const py::object& moved) {
  reads_gradients_ = moved.is_none();
  py::object answers;
  if (!reads_gradients_) {
    answers = as_tuple(moved.ptr());
    if (static_cast<size_t>(PyTuple_GET_SIZE(answers.ptr())) != members_.size()) {
      throw py::value_error("moved must say for each parameter whether it moves");
    }
  }
  mover_of_.assign(members_.size(), -1);
  for (size_t position = 0; position < members_.size(); ++position) {
    const Member member = members_[position];
    if (reads_gradients_ && position + kTensorsAhead < members_.size()) {
      prefetch_.tensor(members_[position + kTensorsAhead].param);
    }
    if (member.again) continue;
    Mover mover = {static_cast<int32_t>(position), member.param, {}, {}, {}, false};
    mover.items[kParam] = member.param;
    if (!reads_gradients_) {
      const auto index = static_cast<Py_ssize_t>(position);
      const int moves = PyObject_IsTrue(PyTuple_GET_ITEM(answers.ptr(), index));
      if (moves < 0) throw py::error_already_set();
      if (moves == 0) continue;
    } else {
      PyObject* const gradient = gradient_of(member.param);
      if (gradient == nullptr) continue;
      mover.items[kGrad] = gradient;
    }
    mover_of_[position] = static_cast<int32_t>(movers_.size());
    movers_.push_back(mover);
  }
}

PyObject* Roster::gradient_of(PyObject* param) {
  static const Attribute grad("grad");
  PyObject* const gradient = checked(grad.of(param, is_plain_type(param) || is_dtensor(param)));
  held_.keep_new(gradient);
  return gradient == Py_None ? nullptr : gradient;
}

// Walking a dict in its order is faster than looking names up; so is finding the parameters there
// where they stood in the last step.
void Roster::find_state(const py::dict& state) {
  PyObject* key = nullptr;
  PyObject* value = nullptr;
  Py_ssize_t place = 0;
  size_t i = 0;
  while (PyDict_Next(state.ptr(), &place, &key, &value)) {
    if (i == state_entries_.size() || state_entries_[i].key != key) {
      states_.clear();
      order_state(state);
      find_state(state);
      return;
    }
    const int32_t position = state_entries_[i++].position;
    const int32_t mover = position < 0 ? -1 : mover_of_[position];
    if (mover < 0 || !PyDict_Check(value)) continue;
    __builtin_prefetch(value);
    states_.emplace_back(mover, value);
  }
  for (size_t at = 0; at < states_.size(); ++at) {
    if (at + kTensorsAhead < states_.size()) {
      const auto* const next = reinterpret_cast<PyDictObject*>(states_[at + kTensorsAhead].second);
      for (int line = 0; line < 3; ++line) {
        __builtin_prefetch(reinterpret_cast<const char*>(next->ma_keys) + 64 * line);
      }
    }
    find_items(states_[at].second, movers_[states_[at].first]);
  }
  states_.clear();
}

void Roster::order_state(const py::dict& state) {
  std::unordered_map<PyObject*, int32_t> position_of;
  for (size_t i = 0; i < members_.size(); ++i) {
    position_of.emplace(members_[i].param, static_cast<int32_t>(i));  // the first, if named again
  }
  state_entries_.clear();
  PyObject* key = nullptr;
  PyObject* value = nullptr;
  Py_ssize_t place = 0;
  while (PyDict_Next(state.ptr(), &place, &key, &value)) {
    const auto found = position_of.find(key);
    state_entries_.push_back({key, found == position_of.end() ? -1 : found->second});
  }
}

void Roster::find_items(PyObject* state, Mover& mover) {
  PyObject* name = nullptr;
  PyObject* value = nullptr;
  Py_ssize_t place = 0;
  while (PyDict_Next(state, &place, &name, &value)) {
    // Most are the very strings, which an address tells.
    const auto is_it = [&](const py::object& known) { return known.ptr() == name; };
    const auto is_called_so = [&](const py::object& known) {
      return !known.is_none() && same_name(name, known.ptr());
    };
    auto found = std::find_if(names_.begin(), names_.end(), is_it);
    if (found == names_.end()) found = std::find_if(names_.begin(), names_.end(), is_called_so);
    if (found == names_.end() || found->is_none()) continue;
    PyObject*& item = mover.items[kItemOf[found - names_.begin()]];
    if (item == nullptr) item = held_.keep(value);
  }
}

}  // namespace ranger
