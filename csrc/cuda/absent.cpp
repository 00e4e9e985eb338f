// A build without CUDA: Python makes no launcher for a device, and `info` says why.
#include "device.h"
#include "error.h"
#include "launch.h"

namespace ranger::cuda {
namespace {

[[noreturn]] void refuse() { throw Error("this build of ranger_cuda has no CUDA kernels"); }

}  // namespace

struct Launcher::DeviceTables {};

DeviceReport report_devices() {
  DeviceReport report;
  report.error = "built without CUDA";
  return report;
}

void Launcher::prepare(const Rows&) { refuse(); }
void Launcher::launch(const Rows&, const std::vector<Hyperparameters>&, const Signals&, void*,
                      void*) {
  refuse();
}
void Launcher::squares(const Rows&, const std::vector<int32_t>&, double*, void*) { refuse(); }
void Launcher::swap(void*) { refuse(); }

}  // namespace ranger::cuda
