// The extension module ranger_cuda._C. Links no libtorch: one binary serves every torch >= 2.10.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "build_info.h"
#include "cpu/kernels.h"
#include "step_plan.h"
#if defined(RANGER_WITH_CUDA)
#include "cuda/device.h"
#endif

namespace py = pybind11;

namespace ranger {
namespace {

// The fields of ranger_cuda.hyperparameters.Hyperparameters, in its order.
Hyperparameters to_hyperparameters(const py::tuple& fields, double grad_scale) {
  enum { kLr, kBeta1, kBeta2, kEps, kDecay, kRhoThreshold, kAlpha, kK, kDecoupled };
  const auto number = [&](int i) { return fields[i].cast<double>(); };
  return {number(kLr),
          number(kBeta1),
          number(kBeta2),
          number(kEps),
          number(kDecay),
          number(kRhoThreshold),
          number(kAlpha),
          fields[kK].cast<int64_t>(),
          fields[kDecoupled].cast<bool>(),
          grad_scale};
}

void launch(StepPlan& plan, const py::sequence& groups, const std::vector<double>& grad_scales,
            int num_threads) {
  std::vector<Hyperparameters> hypers;
  for (size_t i = 0; i < groups.size(); ++i) {
    hypers.push_back(to_hyperparameters(groups[i].cast<py::tuple>(), grad_scales.at(i)));
  }
  plan.launch(hypers, num_threads);
}

py::tuple schedule_of(const py::tuple& fields, int64_t step) {
  const Schedule s = schedule(to_hyperparameters(fields, 1.0), step);
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
#if defined(RANGER_WITH_CUDA)
  const cuda::DeviceReport report = cuda::report_devices();
  py::dict device;
  device["runtime_version"] = report.runtime_version;
  device["driver_version"] = report.driver_version;
  device["error"] = report.error;
  device["devices"] = report.devices;
  info["cuda_device"] = device;
#endif
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "Native kernels of ranger_cuda; see csrc/.";

  py::class_<StepPlan> plan(module, "StepPlan");
  py::enum_<StepPlan::Rule>(plan, "Rule")
      .value("RADAM", StepPlan::Rule::kRadam)
      .value("LOOKAHEAD", StepPlan::Rule::kLookahead);
  plan.def(py::init<StepPlan::Rule, py::capsule, py::object, py::object>(), py::arg("rule"),
           py::arg("exchange_api"), py::arg("plain"), py::arg("plain_grad"))
      .def("add_row", &StepPlan::add_row, py::arg("param"), py::arg("group"), py::arg("name"),
           py::arg("state"), py::arg("streams"), py::arg("step_name"))
      .def("add_idle", &StepPlan::add_idle, py::arg("param"), py::arg("group"))
      .def("add_foreign", &StepPlan::add_foreign, py::arg("param"), py::arg("group"))
      .def("finish", &StepPlan::finish, py::arg("optimizer_state"))
      .def("collect", &StepPlan::collect, py::arg("param_groups"), py::arg("optimizer_state"),
           py::arg("moved") = py::none())
      .def("launch", &launch, py::arg("hypers"), py::arg("grad_scales"), py::arg("num_threads"));

  module.def("schedule", &schedule_of, py::arg("hyper"), py::arg("step"),
             "The scalars of one step, for tests against ranger_cuda.schedule.");
  module.def("build_info", &build_info, "What this binary was built with and what it finds here.");
}

}  // namespace ranger
