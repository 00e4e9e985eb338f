#include "memory.h"

namespace ptx {

std::string describe(const Access& access, const char* what) {
  constexpr const char* kSpaces[] = {"global", "shared", "parameter"};
  return std::string(what) + ": " + (access.store ? "store of " : "load of ") +
         std::to_string(access.size) + " bytes at " + kSpaces[static_cast<int>(access.space)] +
         " address " + std::to_string(access.address) + ", access " + std::to_string(access.site);
}

void Bounds::check(const Access& access) const {
  auto after = ends_.upper_bound(access.address);
  if (after == ends_.begin() || access.address + access.size > std::prev(after)->second) {
    throw Fault(describe(access, "memory that is nobody's"));
  }
}

char* SharedMemory::locate(const Access& access, u32 thread) {
  if (access.address + access.size > bytes_.size()) throw Fault(describe(access, "out of range"));
  for (u64 at = access.address; at < access.address + access.size; ++at) {
    Owner& owner = owners_[at];
    if (owner.phase == 0 && !access.store) throw Fault(describe(access, "nothing was written"));
    if (owner.phase != phase_) owner = {phase_};
    const auto is_another = [&](s64 it) { return it != kNobody && it != thread; };
    if (is_another(owner.writer) || (access.store && is_another(owner.reader))) {
      throw Fault(describe(access, "race with another thread"));
    }
    if (access.store) {
      owner.writer = thread;
    } else {
      owner.reader = is_another(owner.reader) ? kSeveral : thread;
    }
  }
  return bytes_.data() + access.address;
}

Arguments::Arguments(const Kernel& kernel, void** values) {
  for (const Parameter& parameter : kernel.parameters) {
    size_ = std::max<u64>(size_, parameter.offset + parameter.size);
  }
  words_.assign((size_ + 7) / 8, 0x5a5a5a5a5a5a5a5a);
  for (size_t i = 0; i < kernel.parameters.size(); ++i) {
    const auto [offset, size] = kernel.parameters[i];
    std::memcpy(reinterpret_cast<char*>(words_.data()) + offset, values[i], size);
  }
}

char* Arguments::locate(const Access& access) {
  if (access.store) throw Fault(describe(access, "arguments are read only"));
  if (access.address + access.size > size_ || access.address > size_) {
    throw Fault(describe(access, "out of range"));
  }
  return reinterpret_cast<char*>(words_.data()) + access.address;
}

}  // namespace ptx
