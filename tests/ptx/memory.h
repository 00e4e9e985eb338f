// Memory as a kernel sees it, with a fault for each access that is wrong.
#pragma once

#include <map>
#include <string>
#include <vector>

#include "runtime.h"

namespace ptx {

std::string describe(const Access& access, const char* what);

// Addresses that kernels may use, once bounds are told; before that, all but null's neighbours.
class Bounds {
 public:
  void allow(u64 begin, u64 size) {
    if (size > 0) ends_[begin] = begin + size;
  }
  void forbid(u64 begin) { ends_.erase(begin); }
  void check(const Access& access) const;

 private:
  std::map<u64, u64> ends_;
};

// A block's. Between two barriers no thread may write what another reads or writes.
class SharedMemory {
 public:
  explicit SharedMemory(u32 size) : bytes_(size, char(0xff)), owners_(size) {}

  char* locate(const Access& access, u32 thread);
  void pass_barrier() { ++phase_; }

 private:
  static constexpr s64 kNobody = -1, kSeveral = -2;
  struct Owner {
    u64 phase = 0;  // in which the two came; 0: nothing was ever written
    s64 reader = kNobody, writer = kNobody;
  };

  std::vector<char> bytes_;
  std::vector<Owner> owners_;
  u64 phase_ = 1;
};

// The arguments of a launch, which a kernel may read.
class Arguments {
 public:
  Arguments(const Kernel& kernel, void** values);
  char* locate(const Access& access);

 private:
  std::vector<u64> words_;
  u64 size_ = 0;
};

}  // namespace ptx
