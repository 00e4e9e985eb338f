#include "step_plan.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <utility>

namespace py = pybind11;

namespace ranger {
namespace {

// float32 counts no further; a step after these counts none (design.md).
constexpr float kMostSteps = 16777216.0f;

// Borrowed names, made once and never freed.
PyObject* interned(const char* name) {
  PyObject* string = PyUnicode_InternFromString(name);
  if (string == nullptr) throw py::error_already_set();
  return string;
}

py::object steal(PyObject* object) {
  if (object == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(object);
}

// The getter behind `tensor.grad`, for types that do not replace it: half the time of a look-up.
PyGetSetDescrObject* gradient_getter() {
  static PyObject* const descriptor =
      py::object(py::module_::import("torch").attr("Tensor").attr("grad")).release().ptr();
  return Py_TYPE(descriptor) == &PyGetSetDescr_Type
             ? reinterpret_cast<PyGetSetDescrObject*>(descriptor)
             : nullptr;
}

// Whether a tensor stands for the negative of its memory, which DLPack does not tell. Such a tensor
// is the imaginary part of a complex one: its elements do not lie side by side, and a single one
// starts at an odd multiple of the item size. Any other need not be asked.
bool is_negated(PyObject* tensor, const DLTensor& described) {
  static PyObject* const name = interned("is_neg");
  const uintptr_t item = described.dtype.bits / 8;
  bool apart = false;
  bool side_by_side = false;
  for (int32_t dim = 0; dim < described.ndim; ++dim) {
    if (described.shape[dim] == 1) continue;
    apart = true;
    side_by_side = side_by_side || described.strides[dim] <= 1;
  }
  const bool odd = reinterpret_cast<uintptr_t>(data_of(described)) % (2 * item) == item;
  if (!odd && (side_by_side || !apart)) return false;
  return steal(PyObject_CallMethodNoArgs(tensor, name)).ptr() == Py_True;
}

void set_stream(TensorRow& row, Stream stream, const DLTensor& tensor,
                const std::vector<int32_t>& order) {
  row.data[stream] = data_of(tensor);
  row.strides[stream] = ordered_strides(layout_of(tensor), order);
}

}  // namespace

StepPlan::StepPlan(Rule rule, const py::capsule& exchange_api, py::object plain,
                   py::object plain_grad)
    : rule_(rule),
      exchange_(exchange_api),
      plain_(std::move(plain)),
      plain_grad_(std::move(plain_grad)),
      on_death_([life = life_](py::handle) {
        life->outlived = true;
        life->memory.reset();
      }) {}

// Freeing a device's memory waits for the device, and other threads need not.
StepPlan::~StepPlan() {
  const py::gil_scoped_release released;
  devices_.clear();
}

PyObject* StepPlan::watch(py::handle object) {
  watches_.emplace_back(object, on_death_);
  return object.ptr();
}

StepPlan::Entry& StepPlan::add_entry(py::object param, int32_t group, Kind kind) {
  const bool has_own_grad = !py::type::of(param).attr("grad").is(
      py::module_::import("torch").attr("Tensor").attr("grad"));
  entries_.push_back({watch(param), group, -1, kind, true, has_own_grad, py::str()});
  return entries_.back();
}

void StepPlan::add_idle(py::object param, int32_t group) {
  add_entry(std::move(param), group, Kind::kIdle);
}

void StepPlan::add_foreign(py::object param, int32_t group) {
  add_entry(std::move(param), group, Kind::kForeign);
}

void StepPlan::add_row(py::object param, int32_t group, py::str name, const std::string& backend,
                       py::dict state, const py::sequence& streams, py::str step_name) {
  const py::object plain = plain_(param);
  const DLTensor tensor = exchange_.describe(plain.ptr());
  const Layout layout = layout_of(tensor);

  TensorRow row;
  if (backend == "cuda") row.device = tensor.device.device_id;
  if (backend == "triton") row.device = kFromPython;
  RowKey key;
  key.param = TensorKey(tensor);
  key.order = memory_order(layout);
  row.numel = count_elements(layout);
  row.dtype = dtype_of(tensor).value();
  row.group = group;
  row.sizes = ordered_sizes(layout, key.order);
  set_stream(row, kParam, tensor, key.order);
  bind_state(row, key, state, streams, step_name);

  Entry& entry = add_entry(param, group, Kind::kRow);
  entry.row = static_cast<int32_t>(rows_.size());
  entry.is_plain = describes_itself(param, key.param);
  entry.name = std::move(name);
  rows_.push_back(std::move(row));
  keys_.push_back(std::move(key));
}

void StepPlan::bind_state(TensorRow& row, RowKey& key, const py::dict& state,
                          const py::sequence& streams, const py::str& step_name) {
  static constexpr Stream kStateStreams[] = {kExpAvg, kExpAvgSq, kSlowParam};
  std::unordered_map<PyObject*, TensorKey> used;
  for (size_t i = 0; i < std::size(kStateStreams); ++i) {
    const py::object name = streams[i];
    if (name.is_none()) continue;
    const py::object whole = state[name];
    const py::object part = plain_(whole);
    const DLTensor tensor = exchange_.describe(part.ptr());
    if (!key.param.same_kind(tensor) || !key.param.same_shape(tensor)) {
      throw py::value_error("state " + std::string(py::str(name)) +
                            " differs from its parameter in dtype, device or shape");
    }
    require_state();  // all rows' so far
    set_stream(row, kStateStreams[i], tensor, key.order);
    life_->memory->push_back(part);
    used[whole.ptr()] = TensorKey(tensor);
  }
  const py::object step = state[step_name];
  const DLTensor tensor = exchange_.describe(step.ptr());
  const bool reachable =
      row.device == kCpu ? tensor.device.device_type == kDLCPU : key.param.same_device(tensor);
  if (dtype_of(tensor) != DType::kFloat32 || !reachable) {
    throw py::value_error("state " + std::string(step_name) +
                          " must be a float32 tensor where its parameter's kernels run");
  }
  const py::object part = step.attr("detach")();
  require_state();
  row.step = static_cast<float*>(data_of(tensor));
  life_->memory->push_back(part);
  used[step.ptr()] = TensorKey(tensor);

  for (const auto& [name, value] : state) {
    StateItem item{py::reinterpret_borrow<py::object>(name), nullptr, {}, false};
    const auto found = used.find(value.ptr());
    if (found != used.end()) {
      item.tensor = watch(value);
      item.memory = found->second;
      item.is_plain = describes_itself(value, item.memory);
    }
    key.state.push_back(std::move(item));
  }
}

// False for a DTensor or a complex tensor, which are described through plain_().
bool StepPlan::describes_itself(py::handle tensor, const TensorKey& key) const {
  DLTensor itself;
  return exchange_.try_describe(tensor.ptr(), &itself) && key.matches(itself);
}

void StepPlan::finish(const py::dict& optimizer_state) {
  std::unordered_map<PyObject*, int32_t> row_of;
  for (const Entry& entry : entries_) {
    if (entry.kind == Kind::kRow) row_of[entry.param] = entry.row;
  }
  for (const auto& [key, value] : optimizer_state) {
    const auto found = row_of.find(key.ptr());
    state_entries_.push_back({key.ptr(), found == row_of.end() ? -1 : found->second});
  }
  chunks_ = cut_into_chunks(rows_, cpu::kChunkSize);
  for (const TensorRow& row : rows_) {
    const auto is_its = [&](const cuda::DevicePlan& plan) { return plan.device() == row.device; };
    if (row.device == kCpu) {
      has_cpu_rows_ = true;
    } else if (row.device == kFromPython) {
      is_for_python_ = true;
    } else if (std::none_of(devices_.begin(), devices_.end(), is_its)) {
      devices_.emplace_back(row.device);
    }
  }
  active_.assign(rows_.size(), false);
}

std::vector<int32_t> StepPlan::devices() const {
  std::vector<int32_t> indices;
  for (const cuda::DevicePlan& plan : devices_) indices.push_back(plan.device());
  return indices;
}

// Walking the dict in its order is faster than looking names up; another order is a change, too.
bool StepPlan::same_items(const std::vector<StateItem>& items, PyObject* state) {
  PyObject* name = nullptr;
  PyObject* value = nullptr;
  Py_ssize_t position = 0;
  size_t i = 0;
  while (PyDict_Next(state, &position, &name, &value)) {
    if (i == items.size() || items[i].name.ptr() != name) return false;
    if (items[i].tensor != nullptr && items[i].tensor != value) return false;
    ++i;
  }
  return i == items.size();
}

bool StepPlan::state_is_unchanged(const py::dict& optimizer_state) {
  PyObject* key = nullptr;
  PyObject* value = nullptr;
  Py_ssize_t position = 0;
  size_t i = 0;
  while (PyDict_Next(optimizer_state.ptr(), &position, &key, &value)) {
    if (i == state_entries_.size() || state_entries_[i].key != key) return false;
    const int32_t row = state_entries_[i++].row;
    if (row < 0) continue;
    if (!PyDict_Check(value)) return false;
    if (!same_items(keys_[row].state, value)) return false;
  }
  return i == state_entries_.size() && probe_memory();
}

// The same tensor objects may have been given other memory (`tensor.data = ...`, as scripts do that
// move a whole state to another device). Describing each would double the cost of a step, so this
// takes some rows after the other: it sees at once what was done to all. Launches from Python cost
// so much more that all are described there, but for those that Python has to describe.
bool StepPlan::probe_memory() {
  constexpr size_t kProbes = 32;
  if (is_for_python_) {
    for (const RowKey& key : keys_) {
      for (const StateItem& item : key.state) {
        if (item.tensor != nullptr && item.is_plain && !is_unmoved(item)) return false;
      }
    }
  }
  for (size_t i = 0; i < std::min(kProbes, keys_.size()); ++i) {
    probe_ = (probe_ + 1) % keys_.size();
    bool asked_python = false;
    for (const StateItem& item : keys_[probe_].state) {
      if (item.tensor == nullptr) continue;
      if (!is_unmoved(item)) return false;
      asked_python = asked_python || !item.is_plain;
    }
    if (asked_python) break;  // that took as long as all the others
  }
  return true;
}

bool StepPlan::is_unmoved(const StateItem& item) const {
  if (life_->outlived) return false;  // to describe one in Python lets other threads run
  DLTensor tensor;
  if (item.is_plain) {
    return exchange_.try_describe(item.tensor, &tensor) && item.memory.matches(tensor);
  }
  const py::object part = plain_(py::handle(item.tensor));
  return exchange_.try_describe(part.ptr(), &tensor) && item.memory.matches(tensor);
}

bool StepPlan::collect(const py::list& param_groups, const py::dict& optimizer_state,
                       const py::object& moved) {
  const auto memory = life_->memory;  // the counts that are read are alive, whatever others do
  if (!find_active(param_groups, optimizer_state, moved)) return false;
  const py::gil_scoped_release released;
  for (cuda::DevicePlan& plan : devices_) plan.prepare(rows_);
  return true;
}

bool StepPlan::find_active(const py::list& param_groups, const py::dict& optimizer_state,
                           const py::object& moved) {
  static PyObject* const kParams = interned("params");
  static PyObject* const kGrad = interned("grad");
  static PyGetSetDescrObject* const getter = gradient_getter();
  active_.assign(rows_.size(), false);
  reads_gradients_ = moved.is_none();
  gradients_.clear();
  if (life_->outlived) return false;

  size_t position = 0;
  for (Py_ssize_t group = 0; group < PyList_GET_SIZE(param_groups.ptr()); ++group) {
    PyObject* params = PyDict_GetItemWithError(PyList_GET_ITEM(param_groups.ptr(), group), kParams);
    if (params == nullptr || !PyList_Check(params)) return false;
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(params); ++i, ++position) {
      PyObject* param = PyList_GET_ITEM(params, i);
      if (position == entries_.size()) return false;
      const Entry& entry = entries_[position];
      if (entry.group != group || entry.param != param) return false;
      if (entry.kind == Kind::kForeign) continue;
      py::object gradient;
      if (moved.is_none()) {
        gradient = steal(entry.has_own_grad || getter == nullptr
                             ? PyObject_GetAttr(param, kGrad)
                             : getter->d_getset->get(param, getter->d_getset->closure));
        if (gradient.is_none()) continue;
      } else if (PyList_GET_ITEM(moved.ptr(), position) != Py_True) {
        continue;
      }
      if (entry.kind == Kind::kIdle) return false;
      if (!collect_row(entry, param, gradient.ptr())) return false;
      check_count(entry);
      if (gradient) gradients_.push_back(std::move(gradient));
      active_[entry.row] = true;
    }
  }
  return position == entries_.size() && state_is_unchanged(optimizer_state);
}

bool StepPlan::collect_row(const Entry& entry, PyObject* param, PyObject* grad) {
  const RowKey& key = keys_[entry.row];
  if (entry.is_plain) {
    DLTensor tensor;
    if (!exchange_.try_describe(param, &tensor) || !key.param.matches(tensor)) return false;
    if (grad == nullptr || bind_gradient(entry, grad)) return true;
  } else {
    const py::object plain = plain_(py::handle(param));
    if (!key.param.matches(exchange_.describe(plain.ptr()))) return false;
    if (grad == nullptr) return true;
  }
  py::object resolved = plain_grad_(py::handle(param), entry.name);
  const bool bound = bind_gradient(entry, resolved.ptr());
  gradients_.push_back(std::move(resolved));
  return bound;
}

// Only on the CPU: nobody waits for a device to look at a count there.
void StepPlan::check_count(const Entry& entry) const {
  const TensorRow& row = rows_[entry.row];
  if (row.device != kCpu) return;
  const float count = *row.step;
  if (!(count >= 0 && count <= kMostSteps && count == std::floor(count))) {
    throw std::runtime_error("the step count of " + std::string(entry.name) + " is " +
                             std::to_string(count) + "; it is a whole number, at least 0");
  }
}

bool StepPlan::bind_gradient(const Entry& entry, PyObject* grad) {
  const RowKey& key = keys_[entry.row];
  TensorRow& row = rows_[entry.row];
  DLTensor tensor;
  if (!exchange_.try_describe(grad, &tensor)) return false;
  if (!key.param.same_kind(tensor) || !key.param.same_shape(tensor)) return false;
  if (is_negated(grad, tensor)) return false;
  row.data[kGrad] = data_of(tensor);
  Strides strides = key.param.same_layout(tensor) ? row.strides[kParam]
                                                  : ordered_strides(layout_of(tensor), key.order);
  if (strides != row.strides[kGrad]) {
    row.strides[kGrad] = std::move(strides);
    ++layout_changes_;
    for (cuda::DevicePlan& plan : devices_) {
      if (plan.device() == row.device) plan.forget();  // it has the strides in its tables
    }
  }
  return true;
}

void StepPlan::launch(const std::vector<Hyperparameters>& hypers, const Scaling& scaling,
                      const std::vector<Signals>& signals, int num_threads) {
  for (size_t i = 0; i < devices_.size(); ++i) launch_on(devices_[i], hypers, signals.at(i));
  if (has_cpu_rows_) launch_on_cpu(hypers, scaling, num_threads);  // while the devices work
  gradients_.clear();
}

void StepPlan::launch_on_cpu(const std::vector<Hyperparameters>& hypers, const Scaling& scaling,
                             int num_threads) {
  row_scalars_.assign(rows_.size(), nullptr);
  scalars_.clear();
  // Parameters of a group mostly share their step, and so their scalars.
  int32_t last_group = -1;
  int64_t last_step = 0;
  for (size_t i = 0; i < rows_.size(); ++i) {
    const TensorRow& row = rows_[i];
    if (!active_[i] || row.device != kCpu) continue;
    const int64_t step = static_cast<int64_t>(*row.step) + 1;
    if (row.group != last_group || step != last_step) {
      const Hyperparameters& hyper = hypers[row.group];
      scalars_.emplace_back(hyper, step, grad_scale(hyper, scaling.unscale, scaling.norm));
      last_group = row.group;
      last_step = step;
    }
    row_scalars_[i] = &scalars_.back();
    *row.step = static_cast<float>(step);
  }
  const py::gil_scoped_release released;
  const auto run = rule_ == Rule::kRadam ? cpu::radam_step : cpu::lookahead_step;
  run(rows_, chunks_, row_scalars_, num_threads);
}

void StepPlan::launch_on(cuda::DevicePlan& device, const std::vector<Hyperparameters>& hypers,
                         const Signals& signals) {
  cuda::Signals read;
  read.grad_scale = scalar_of(signals.grad_scale, device.device());
  read.found_inf = scalar_of(signals.found_inf, device.device());
  read.norm = scalar_of(signals.norm, device.device());
  for (const py::object& lr : signals.lr) read.lr.push_back(scalar_of(lr, device.device()));
  void* const stream = exchange_.current_stream(device.device());
  const py::gil_scoped_release released;
  device.schedule(rows_, active_, hypers, read, stream);
  if (rule_ == Rule::kRadam) {
    device.radam(rows_, active_, stream);
  } else {
    device.lookahead(stream);
  }
}

cuda::DeviceScalar StepPlan::scalar_of(const py::object& tensor, int32_t device) const {
  if (tensor.is_none()) return {};
  const DLTensor described = exchange_.describe(tensor.ptr());
  const std::optional<DType> dtype = dtype_of(described);
  if (!dtype || described.device.device_id != device || count_elements(layout_of(described)) != 1) {
    throw py::value_error("a step's scalar must be one float32 or float64 on the step's device");
  }
  return {data_of(described), *dtype == DType::kFloat64};
}

void StepPlan::require_state() const {
  if (!life_->outlived) return;
  throw std::runtime_error(
      "the optimizer's state was replaced while a step was under way, in another thread or a hook; "
      "let one at a time");
}

py::object StepPlan::hold() const {
  require_state();
  using Memory = decltype(life_->memory);
  return py::capsule(new Memory(life_->memory),
                     [](void* held) { delete static_cast<Memory*>(held); });
}

py::list StepPlan::rows() const {
  py::list rows;
  for (const TensorRow& row : rows_) {
    std::vector<uintptr_t> addresses;
    for (const void* data : row.data) addresses.push_back(reinterpret_cast<uintptr_t>(data));
    addresses[kGrad] = 0;
    rows.append(py::make_tuple(row.numel, row.dtype == DType::kFloat64, row.group,
                               reinterpret_cast<uintptr_t>(row.step), row.sizes, addresses,
                               row.strides));
  }
  return rows;
}

py::list StepPlan::gradients() const {
  py::list addresses(rows_.size());
  for (size_t i = 0; i < rows_.size(); ++i) {
    const auto address = reinterpret_cast<uintptr_t>(rows_[i].data[kGrad]);
    const uintptr_t told = !active_[i] ? 0 : reads_gradients_ && address != 0 ? address : 1;
    PyList_SET_ITEM(addresses.ptr(), static_cast<Py_ssize_t>(i), py::int_(told).release().ptr());
  }
  return addresses;
}

py::list StepPlan::moved() const {
  if (life_->outlived) return py::list();
  py::list params(std::count(active_.begin(), active_.end(), true));
  Py_ssize_t position = 0;
  for (const Entry& entry : entries_) {
    if (entry.kind != Kind::kRow || !active_[entry.row]) continue;
    PyList_SET_ITEM(params.ptr(), position++, py::handle(entry.param).inc_ref().ptr());
  }
  return params;
}

void StepPlan::swap(int num_threads) {
  for (cuda::DevicePlan& device : devices_) {
    void* const stream = exchange_.current_stream(device.device());
    const py::gil_scoped_release released;
    device.swap(stream);
  }
  if (!has_cpu_rows_) return;
  const py::gil_scoped_release released;
  cpu::swap_slow_weights(rows_, chunks_, num_threads);
}

}  // namespace ranger
