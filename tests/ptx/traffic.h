// What kernels ask of memory, as a GPU's memory sees it: the lanes of a warp together.
#pragma once

#include <map>
#include <set>
#include <string>
#include <tuple>
#include <vector>

#include "runtime.h"

namespace ptx {

// Requests of one instruction: each is of the lanes of a warp that are there.
struct Traffic {
  bool store = false;
  u64 requests = 0;
  u64 lanes = 0;
  u64 bytes = 0;    // that the lanes ask for
  u64 sectors = 0;  // of 32 bytes, that are touched
};

class Counter {
 public:
  void add(const Access& access, u32 thread);
  // The threads of the next block are others.
  void end_block();
  const std::map<int, Traffic>& sites() const { return sites_; }

 private:
  struct Request {
    Traffic traffic;
    std::set<u64> sectors;
  };

  std::map<std::pair<u32, int>, u64> rounds_;              // how often a thread has come to a site
  std::map<std::tuple<u32, int, u64>, Request> requests_;  // of a warp, a site and a round
  std::map<int, Traffic> sites_;
};

}  // namespace ptx
