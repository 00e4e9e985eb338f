// Which device is current to a thread while a launcher works.
#pragma once

#include <cstdint>

namespace ranger::cuda {

// Makes `device` current, and at the end again what was before: another device's context, or none.
//
// By contexts: of a thread that has none cudaGetDevice() says device 0, and to set that again would
// make a context there, which takes memory on a device that may be none of this process's business.
template <class Driver>
class BasicDeviceGuard {
 public:
  explicit BasicDeviceGuard(int32_t device) : device_(device), before_(Driver::current()) {
    changed_ = before_ == nullptr || Driver::device() != device;
    if (changed_) Driver::enter(device);
  }
  ~BasicDeviceGuard() {
    if (changed_) Driver::leave(device_, before_);
  }
  BasicDeviceGuard(const BasicDeviceGuard&) = delete;
  BasicDeviceGuard& operator=(const BasicDeviceGuard&) = delete;

 private:
  int32_t device_;
  void* before_;
  bool changed_;
};

}  // namespace ranger::cuda
