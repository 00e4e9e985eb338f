// What the CUDA runtime says of this machine.
#pragma once

#include <string>
#include <vector>

namespace ranger::cuda {

struct DeviceReport {
  int runtime_version = 0;           // as CUDA counts: 13000 is 13.0
  int driver_version = 0;            // 0: no driver
  std::string error;                 // why no device can be used; empty if one can
  std::vector<std::string> devices;  // name and compute capability
};

// Never throws: a machine without a driver or a device is a report, too.
DeviceReport report_devices();

}  // namespace ranger::cuda
