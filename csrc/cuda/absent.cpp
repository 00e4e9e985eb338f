// A build without CUDA: Python sends no row to a device, and `info` says why.
#include "device.h"
#include "error.h"
#include "launch.h"

namespace ranger::cuda {
namespace {

[[noreturn]] void refuse() { throw Error("this build of ranger_cuda has no CUDA kernels"); }

}  // namespace

struct DevicePlan::DeviceTables {};

DeviceReport report_devices() {
  DeviceReport report;
  report.error = "built without CUDA";
  return report;
}

void DevicePlan::prepare(const std::vector<TensorRow>&) { refuse(); }
void DevicePlan::schedule(const std::vector<TensorRow>&, const std::vector<char>&,
                          const std::vector<Hyperparameters>&, const Signals&, void*) {
  refuse();
}
void DevicePlan::radam(const std::vector<TensorRow>&, const std::vector<char>&, void*) { refuse(); }
void DevicePlan::lookahead(void*) { refuse(); }
void DevicePlan::swap(void*) { refuse(); }

}  // namespace ranger::cuda
