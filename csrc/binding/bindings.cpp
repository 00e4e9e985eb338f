// The extension module ranger_cuda._C. Links no libtorch: one binary serves every torch >= 2.10.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "../cpu/kernels.h"
#include "../cpu/launch.h"
#include "../cuda/device.h"
#include "../cuda/error.h"
#include "../cuda/launch.h"
#include "../roster/roster.h"
#include "bound_launcher.h"
#include "build_info.h"
#include "tables.h"

namespace py = pybind11;

namespace ranger {
namespace {

// --- what comes from Python ----------------------------------------------------------------------

// Of each group, as ranger_cuda.state.hyperparameters.packed() packs them.
std::vector<Hyperparameters> to_groups(const py::bytes& packed) {
  const std::string_view bytes = packed;
  if (bytes.size() % sizeof(Hyperparameters) != 0) {
    throw py::value_error("a group's hyperparameters are numbers of 8 bytes each");
  }
  std::vector<Hyperparameters> hypers(bytes.size() / sizeof(Hyperparameters));
  std::memcpy(hypers.data(), bytes.data(), bytes.size());
  return hypers;
}

cuda::DeviceScalar to_scalar(const py::object& tensor, const TensorExchange& exchange,
                             int32_t device) {
  if (tensor.is_none()) return {};
  DLTensor found;
  const bool is_there = exchange.describe(tensor.ptr(), &found) && data_of(found) != nullptr;
  const std::optional<DType> dtype = is_there ? dtype_of(found) : std::nullopt;
  if ((dtype != DType::kFloat32 && dtype != DType::kFloat64) ||
      found.device.device_type != cuda::kDeviceType || found.device.device_id != device ||
      count_elements(shape_of(found)) != 1) {
    throw py::value_error("a step's scalar must be one float32 or float64 on the step's device");
  }
  return {data_of(found), dtype == DType::kFloat64};
}

// The fields of ranger_cuda.backends.scaling.Signals.
cuda::Signals to_signals(const py::tuple& fields, size_t groups, const TensorExchange& exchange,
                         int32_t device) {
  if (fields.size() != 4) throw py::value_error("signals are four");
  const auto scalar = [&](const py::object& tensor) { return to_scalar(tensor, exchange, device); };
  cuda::Signals signals = {scalar(fields[0]), scalar(fields[1]), scalar(fields[2]), {}};
  for (py::handle lr : fields[3].cast<py::sequence>()) {
    signals.lr.push_back(scalar(py::reinterpret_borrow<py::object>(lr)));
  }
  if (signals.lr.size() != groups) {
    throw py::value_error("there must be a learning rate, or None, for each group");
  }
  return signals;
}

// --- launchers -----------------------------------------------------------------------------------

using CpuLauncher = Bound<cpu::Launcher>;
using CudaLauncher = Bound<cuda::Launcher>;

void require_threads(int num_threads) {
  constexpr int kMost = 4096;
  if (num_threads < 1 || num_threads > kMost) {
    throw py::value_error("num_threads must be from 1 to " + std::to_string(kMost));
  }
}

// A step's arguments, as the CPU's launcher takes them.
struct CpuStep {
  CpuStep(const py::bytes& hypers, double unscale, double norm, int num_threads)
      : groups(to_groups(hypers)), signals{unscale, norm}, num_threads(num_threads) {
    require_threads(num_threads);
  }

  std::vector<Hyperparameters> groups;
  cpu::Signals signals;
  int num_threads;
};

void launch_on_cpu(CpuLauncher& launcher, Roster& roster, const py::bytes& hypers, double unscale,
                   double norm, int num_threads) {
  const CpuStep step(hypers, unscale, norm, num_threads);
  launcher.launch(roster, step.groups.size(), [&](cpu::Launcher& its) {
    its.launch(roster.rows(), step.groups, step.signals, step.num_threads);
  });
}

py::list step_on_cpu(CpuLauncher& launcher, Roster& roster, const py::sequence& param_groups,
                     const py::dict& state, const py::object& moved, const py::bytes& hypers,
                     double unscale, double norm, int num_threads) {
  const CpuStep step(hypers, unscale, norm, num_threads);
  return launcher.step(roster, param_groups, state, moved, step.groups.size(),
                       [&](cpu::Launcher& its) {
                         its.launch(roster.rows(), step.groups, step.signals, step.num_threads);
                       });
}

double squares_on_cpu(CpuLauncher& launcher, Roster& roster, const std::vector<int32_t>& places,
                      int num_threads) {
  require_threads(num_threads);
  return launcher.squares(roster, [&](const cpu::Launcher& its) {
    return its.squares(roster.rows(), places, num_threads);
  });
}

void swap_on_cpu(CpuLauncher& launcher, Roster& roster, int num_threads) {
  require_threads(num_threads);
  launcher.swap(roster, [&](cpu::Launcher& its) { its.swap(roster.rows(), num_threads); });
}

void require_scratch(bool enough) {
  if (!enough) throw py::value_error("gradients are centralized in scratch memory of the device");
}

void* to_scratch(const py::object& tensor, int64_t size, const Roster& roster, int32_t device) {
  if (size == 0) return nullptr;
  DLTensor found;
  const bool is_there = !tensor.is_none() && roster.exchange().describe(tensor.ptr(), &found);
  require_scratch(is_there && found.device.device_type == cuda::kDeviceType &&
                  found.device.device_id == device && is_row_major(shape_of(found)) &&
                  count_elements(shape_of(found)) * found.dtype.bits / 8 >= size);
  return data_of(found);
}

// A step's arguments, as a CUDA device's launcher takes them.
struct CudaStep {
  CudaStep(const py::bytes& hypers, const py::tuple& fields, const Roster& roster, int32_t device)
      : groups(to_groups(hypers)),
        signals(to_signals(fields, groups.size(), roster.exchange(), device)),
        stream(roster.exchange().current_stream(device)) {}

  std::vector<Hyperparameters> groups;
  cuda::Signals signals;
  void* stream;
};

// `scratch`: memory for gradients that are centralized; None where none are.
void launch_on_cuda(CudaLauncher& launcher, Roster& roster, const py::bytes& hypers,
                    const py::tuple& signals, const py::object& scratch) {
  const int32_t device = launcher.launcher().device();
  const CudaStep step(hypers, signals, roster, device);
  void* const memory = to_scratch(scratch, launcher.launcher().scratch_size(), roster, device);
  launcher.launch(roster, step.groups.size(), [&](cuda::Launcher& its) {
    its.launch(roster.rows(), step.groups, step.signals, memory, step.stream);
  });
}

py::list step_on_cuda(CudaLauncher& launcher, Roster& roster, const py::sequence& param_groups,
                      const py::dict& state, const py::object& moved, const py::bytes& hypers,
                      const py::tuple& signals) {
  const CudaStep step(hypers, signals, roster, launcher.launcher().device());
  return launcher.step(roster, param_groups, state, moved, step.groups.size(),
                       [&](cuda::Launcher& its) {
                         require_scratch(its.scratch_size() == 0);
                         its.launch(roster.rows(), step.groups, step.signals, nullptr, step.stream);
                       });
}

void squares_on_cuda(CudaLauncher& launcher, Roster& roster, const std::vector<int32_t>& places,
                     const py::object& total) {
  const int32_t device = launcher.launcher().device();
  const cuda::DeviceScalar out = to_scalar(total, roster.exchange(), device);
  if (!out.is_float64) throw py::value_error("a sum of squares is a float64");
  void* const stream = roster.exchange().current_stream(device);
  launcher.squares(roster, [&](cuda::Launcher& its) {
    its.squares(roster.rows(), places, static_cast<double*>(const_cast<void*>(out.data)), stream);
  });
}

void swap_on_cuda(CudaLauncher& launcher, Roster& roster) {
  void* const stream = roster.exchange().current_stream(launcher.launcher().device());
  launcher.swap(roster, [&](cuda::Launcher& its) { its.swap(stream); });
}

// --- what the roster tells launchers in Python ---------------------------------------------------

// (numel, format, the gradient's DType, group, the step count's address, where its elements begin,
// its slices' length, its place, sizes, each tensor's address and strides); 0 for a tensor that is
// not there, and for the gradient. Sizes and strides are empty where all streams are consecutive.
py::list rows_of(const Roster& roster, int32_t launcher) {
  static const Layout kNone;
  py::list rows;
  for (const TensorRow& row : roster.rows().rows) {
    if (row.launcher != launcher) continue;
    std::vector<uintptr_t> addresses;
    for (const void* data : row.data) addresses.push_back(reinterpret_cast<uintptr_t>(data));
    addresses[kGrad] = 0;
    const Layout& layout = row.layout ? *row.layout : kNone;
    rows.append(py::make_tuple(row.numel, info_of(row.format).name,
                               static_cast<int>(row.grad_dtype), row.group,
                               reinterpret_cast<uintptr_t>(row.step), row.first, row.slice,
                               row.place, layout.sizes, addresses, layout.strides));
  }
  return rows;
}

// Writes to `out`, an array of int64, of the same rows the addresses of their gradients: 0 where
// one rests, 1 where none is read.
void gradients_of(const Roster& roster, int32_t launcher, const py::buffer& out) {
  const py::buffer_info info = out.request(true);
  constexpr py::ssize_t kSize = sizeof(int64_t);
  const std::vector<TensorRow>& rows = roster.rows().rows;
  const auto own = [&](const TensorRow& row) { return row.launcher == launcher; };
  if (info.ndim != 1 || info.itemsize != kSize || info.strides[0] != kSize ||
      info.size != std::count_if(rows.begin(), rows.end(), own)) {
    throw py::value_error("gradients are written to as many int64 side by side as there are rows");
  }
  auto* to = static_cast<uint64_t*>(info.ptr);
  for (const TensorRow& row : rows) {
    if (!own(row)) continue;
    const auto address = reinterpret_cast<uint64_t>(row.data[kGrad]);
    *to++ = row.active ? std::max(address, cuda::kNoGrad) : 0;
  }
}

// --- interrupts ----------------------------------------------------------------------------------

// Python runs the handlers of signals at a function's first instruction, where no `try` of its own
// is yet. What this returns calls `function` again, ignoring its arguments, until `is_done()`, and
// then raises what was first raised.
py::cpp_function insist(const py::function& function, const py::function& is_done) {
  return py::cpp_function([=](const py::args&) {
    std::optional<py::error_already_set> first;
    constexpr int kMostTries = 100;
    bool done = false;
    for (int i = 0; i < kMostTries && !done; ++i) {
      try {
        function();
        done = true;
      } catch (py::error_already_set& error) {
        if (!first) first.emplace(error);
      }
      try {
        done = done || is_done().cast<bool>();
      } catch (py::error_already_set& error) {
        if (!first) first.emplace(error);
      }
    }
    if (first) throw py::error_already_set(*first);
  });
}

// --- for tests, and for `info` -------------------------------------------------------------------

py::tuple schedule_of(const py::bytes& hyper, int64_t step) {
  const Schedule s = schedule(to_groups(hyper).at(0), step);
  return py::make_tuple(s.rectified, s.step_size, s.decay, s.sync);
}

py::dict build_info() {
  py::dict info;
  info["compiler"] = RANGER_BUILD_COMPILER;
  info["commit"] = RANGER_BUILD_COMMIT;
  info["cuda"] = RANGER_BUILD_CUDA;
  info["cuda_architectures"] = RANGER_BUILD_CUDA_ARCHITECTURES;
  info["cuda_reason"] = RANGER_BUILD_CUDA_REASON;
  info["cpu_capability"] = cpu::kernels().instruction_set;
  const cuda::DeviceReport report = cuda::report_devices();
  py::dict device;
  device["runtime_version"] = report.runtime_version;
  device["driver_version"] = report.driver_version;
  device["error"] = report.error;
  device["devices"] = report.devices;
  info["cuda_device"] = device;
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "Native kernels of ranger_cuda; see csrc/.";

  const py::object base = py::module_::import("torch").attr("OutOfMemoryError");
  py::register_local_exception<cuda::Error>(module, "CudaError", PyExc_RuntimeError);
  py::register_local_exception<cuda::OutOfMemory>(module, "CudaOutOfMemoryError", base);

  py::enum_<Rule>(module, "Rule", py::module_local())
      .value("RADAM", Rule::kRadam)
      .value("LOOKAHEAD", Rule::kLookahead);

  py::class_<Roster>(module, "Roster", py::module_local())
      .def(py::init<py::capsule, py::sequence, py::str, py::object, py::object, py::object,
                    py::object, int32_t>(),
           py::arg("exchange_api"), py::arg("streams"), py::arg("step_name"), py::arg("dtensor"),
           py::arg("plain"), py::arg("plain_grad"), py::arg("shard_of"), py::arg("first_place") = 0)
      .def("serve", &Roster::serve, py::arg("tensor"), py::arg("weight_rounding"),
           py::arg("launcher"), py::arg("format"))
      .def("collect", &Roster::collect, py::arg("param_groups"), py::arg("state"),
           py::arg("moved") = py::none(), py::arg("hold") = false)
      .def("leave_out", &Roster::leave_out, py::arg("tensors"))
      .def("pair", &Roster::pair, py::arg("params"), py::arg("slow_params"))
      .def("release", &Roster::release)
      .def("moved", &Roster::moved)
      .def_property_readonly("version", [](const Roster& roster) { return roster.rows().version; })
      .def_property_readonly("group_count", &Roster::group_count)
      .def("rows", &rows_of, py::arg("launcher"))
      .def("gradients", &gradients_of, py::arg("launcher"), py::arg("out"));

  py::class_<CpuLauncher>(module, "CpuLauncher", py::module_local())
      .def(py::init([](Rule rule, int32_t index) {
             return std::make_unique<CpuLauncher>(rule, index, kDLCPU, cpu::Launcher(rule, index));
           }),
           py::arg("rule"), py::arg("index"))
      .def("prepare", &CpuLauncher::prepare, py::arg("roster"))
      .def("launch", &launch_on_cpu, py::arg("roster"), py::arg("hypers"), py::arg("unscale"),
           py::arg("norm"), py::arg("num_threads"))
      .def("step", &step_on_cpu, py::arg("roster"), py::arg("param_groups"), py::arg("state"),
           py::arg("moved"), py::arg("hypers"), py::arg("unscale"), py::arg("norm"),
           py::arg("num_threads"))
      .def("squares", &squares_on_cpu, py::arg("roster"), py::arg("places"), py::arg("num_threads"))
      .def("swap", &swap_on_cpu, py::arg("roster"), py::arg("num_threads"));

  py::class_<CudaLauncher>(module, "CudaLauncher", py::module_local())
      .def(py::init([](Rule rule, int32_t index, int32_t device) {
             return std::make_unique<CudaLauncher>(rule, index, cuda::kDeviceType,
                                                   cuda::Launcher(rule, index, device));
           }),
           py::arg("rule"), py::arg("index"), py::arg("device"))
      .def("prepare", &CudaLauncher::prepare, py::arg("roster"))
      .def("launch", &launch_on_cuda, py::arg("roster"), py::arg("hypers"), py::arg("signals"),
           py::arg("scratch") = py::none())
      .def_property_readonly(
          "scratch_size",
          [](const CudaLauncher& launcher) { return launcher.launcher().scratch_size(); })
      .def("step", &step_on_cuda, py::arg("roster"), py::arg("param_groups"), py::arg("state"),
           py::arg("moved"), py::arg("hypers"), py::arg("signals"))
      .def("squares", &squares_on_cuda, py::arg("roster"), py::arg("places"), py::arg("total"))
      .def("swap", &swap_on_cuda, py::arg("roster"));

  module.def("insist", &insist, py::arg("function"), py::arg("is_done"),
             "A function that calls another to its end, whatever interrupts it.");
  module.def("schedule", &schedule_of, py::arg("hyper"), py::arg("step"),
             "The scalars of one step, for tests against ranger_cuda.backends.schedule.");
  module.def("formats", &format_rows,
             "How parameters and state are stored; see csrc/formats/formats.h.");
  module.def("codecs", &codec_rows, "How numbers are stored; see csrc/formats/codecs.h.");
  module.def("table_layout", &table_layout, "The device tables, for tests against Triton's.");
  module.def("build_info", &build_info, "What this binary was built with and what it finds here.");
}

}  // namespace ranger
