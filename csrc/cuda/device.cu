#include <cuda_runtime.h>

#include "device.h"
#include "runtime.h"

namespace ranger::cuda {

DeviceReport report_devices() {
  DeviceReport report;
  cudaError_t error = cudaRuntimeGetVersion(&report.runtime_version);
  if (error != cudaSuccess) report.error = describe_error("cudaRuntimeGetVersion", error);
  error = cudaDriverGetVersion(&report.driver_version);
  if (error != cudaSuccess) report.error = describe_error("cudaDriverGetVersion", error);
  int count = 0;
  error = cudaGetDeviceCount(&count);
  if (error != cudaSuccess) report.error = describe_error("cudaGetDeviceCount", error);
  for (int device = 0; error == cudaSuccess && device < count; ++device) {
    cudaDeviceProp properties;
    error = cudaGetDeviceProperties(&properties, device);
    if (error != cudaSuccess) {
      report.error = describe_error("cudaGetDeviceProperties", error);
      break;
    }
    report.devices.push_back(std::string(properties.name) + ", sm_" +
                             std::to_string(properties.major) + std::to_string(properties.minor));
  }
  cudaGetLastError();  // an error here is none of the next caller's
  return report;
}

}  // namespace ranger::cuda
