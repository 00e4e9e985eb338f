// The extension module ranger_cuda._C. Links no libtorch: one binary serves every torch >= 2.10.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstddef>

#include "build_info.h"
#include "cpu/kernels.h"
#include "cuda/device.h"
#include "cuda/error.h"
#include "cuda/tables.h"
#include "step_plan.h"

namespace py = pybind11;

namespace ranger {
namespace {

// The fields of ranger_cuda.hyperparameters.Hyperparameters, in its order.
Hyperparameters to_hyperparameters(const py::tuple& fields) {
  enum {
    kLr,
    kBeta1,
    kBeta2,
    kEps,
    kDecay,
    kRhoThreshold,
    kAlpha,
    kK,
    kMaxGradNorm,
    kDecoupled,
    kMaximize
  };
  const auto number = [&](int i) { return fields[i].cast<double>(); };
  return {number(kLr),
          number(kBeta1),
          number(kBeta2),
          number(kEps),
          number(kDecay),
          number(kRhoThreshold),
          number(kAlpha),
          fields[kK].cast<int64_t>(),
          number(kMaxGradNorm),
          fields[kDecoupled].cast<bool>(),
          fields[kMaximize].cast<bool>()};
}

// The fields of ranger_cuda.scaling.Signals.
StepPlan::Signals to_signals(const py::tuple& fields) {
  return {fields[0], fields[1], fields[2], fields[3].cast<std::vector<py::object>>()};
}

void launch(StepPlan& plan, const py::sequence& groups, double unscale, double norm,
            const py::sequence& devices, int num_threads) {
  std::vector<Hyperparameters> hypers;
  for (py::handle group : groups) hypers.push_back(to_hyperparameters(group.cast<py::tuple>()));
  std::vector<StepPlan::Signals> signals;
  for (py::handle device : devices) signals.push_back(to_signals(device.cast<py::tuple>()));
  plan.launch(hypers, {unscale, norm}, signals, num_threads);
}

py::tuple schedule_of(const py::tuple& fields, int64_t step) {
  const Schedule s = schedule(to_hyperparameters(fields), step);
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

// Where the fields of the device tables stand, in 8-byte words: the Triton kernels have the same.
py::dict table_layout() {
  const auto words = [](size_t bytes) { return bytes / 8; };
  py::dict layout;
  layout["row_words"] = words(sizeof(cuda::DeviceRow));
  layout["numel"] = words(offsetof(cuda::DeviceRow, numel));
  layout["step"] = words(offsetof(cuda::DeviceRow, step));
  layout["layout"] = words(offsetof(cuda::DeviceRow, layout));
  layout["group"] = words(offsetof(cuda::DeviceRow, group));
  layout["scalar_words"] = words(sizeof(cuda::RowScalars));
  layout["coefficients"] = words(offsetof(cuda::RowScalars, f64));
  layout["active"] = cuda::kActive;
  layout["rectified"] = cuda::kRectified;
  layout["l2"] = cuda::kL2;
  layout["sync"] = cuda::kSync;
  return layout;
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "Native kernels of ranger_cuda; see csrc/.";

  const py::object base = py::module_::import("torch").attr("OutOfMemoryError");
  py::register_local_exception<cuda::Error>(module, "CudaError", PyExc_RuntimeError);
  py::register_local_exception<cuda::OutOfMemory>(module, "CudaOutOfMemoryError", base);

  py::class_<StepPlan> plan(module, "StepPlan", py::module_local());
  py::enum_<StepPlan::Rule>(plan, "Rule", py::module_local())
      .value("RADAM", StepPlan::Rule::kRadam)
      .value("LOOKAHEAD", StepPlan::Rule::kLookahead);
  plan.def(py::init<StepPlan::Rule, py::capsule, py::object, py::object>(), py::arg("rule"),
           py::arg("exchange_api"), py::arg("plain"), py::arg("plain_grad"))
      .def("add_row", &StepPlan::add_row, py::arg("param"), py::arg("group"), py::arg("name"),
           py::arg("backend"), py::arg("state"), py::arg("streams"), py::arg("step_name"))
      .def("add_idle", &StepPlan::add_idle, py::arg("param"), py::arg("group"))
      .def("add_foreign", &StepPlan::add_foreign, py::arg("param"), py::arg("group"))
      .def("finish", &StepPlan::finish, py::arg("optimizer_state"))
      .def("collect", &StepPlan::collect, py::arg("param_groups"), py::arg("optimizer_state"),
           py::arg("moved") = py::none())
      .def("devices", &StepPlan::devices)
      .def("has_cpu_rows", &StepPlan::has_cpu_rows)
      .def("launch", &launch, py::arg("hypers"), py::arg("unscale"), py::arg("norm"),
           py::arg("signals"), py::arg("num_threads"))
      .def("rows", &StepPlan::rows)
      .def("gradients", &StepPlan::gradients)
      .def("layout_changes", &StepPlan::layout_changes)
      .def("hold", &StepPlan::hold)
      .def("moved", &StepPlan::moved)
      .def("release", &StepPlan::release)
      .def("swap", &StepPlan::swap, py::arg("num_threads"));

  module.def("schedule", &schedule_of, py::arg("hyper"), py::arg("step"),
             "The scalars of one step, for tests against ranger_cuda.schedule.");
  module.def("table_layout", &table_layout, "The device tables, for tests against Triton's.");
  module.def("build_info", &build_info, "What this binary was built with and what it finds here.");
}

}  // namespace ranger
