#include "traffic.h"

namespace ptx {

constexpr u32 kWarp = 32;
constexpr u64 kSector = 32;

void Counter::add(const Access& access, u32 thread) {
  const u64 round = rounds_[{thread, access.site}]++;
  Request& request = requests_[{thread / kWarp, access.site, round}];
  request.traffic.store = access.store;
  ++request.traffic.lanes;
  request.traffic.bytes += access.size;
  const u64 last = (access.address + access.size - 1) / kSector;
  for (u64 at = access.address / kSector; at <= last; ++at) request.sectors.insert(at);
}

void Counter::end_block() {
  for (const auto& [key, request] : requests_) {
    Traffic& site = sites_[std::get<int>(key)];
    site.store = request.traffic.store;
    ++site.requests;
    site.lanes += request.traffic.lanes;
    site.bytes += request.traffic.bytes;
    site.sectors += request.sectors.size();
  }
  requests_.clear();
  rounds_.clear();
}

}  // namespace ptx
