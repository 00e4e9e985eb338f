// What a failing CUDA call throws; bindings.cpp makes Python exceptions of them.
#pragma once

#include <stdexcept>

namespace ranger::cuda {

class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// There is not enough free memory; that which torch's allocator caches may be given back.
class OutOfMemory : public Error {
 public:
  using Error::Error;
};

}  // namespace ranger::cuda
