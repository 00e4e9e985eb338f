#include "cuda/device.h"

namespace ranger::cuda {

DeviceReport report_devices() {
  DeviceReport report;
  report.devices = {"this CPU, standing in for a GPU"};
  return report;
}

}  // namespace ranger::cuda
