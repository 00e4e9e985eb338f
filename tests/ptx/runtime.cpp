// Runs a launch: one block after the other, and between two barriers one thread after the other.
#include "runtime.h"

#include <dlfcn.h>

#include <map>
#include <mutex>
#include <sstream>

#include "fibers.h"
#include "memory.h"
#include "traffic.h"

namespace ptx {
namespace {

struct Module {
  std::map<std::string, Kernel> kernels;
};

// What a launch was, for tests that count.
struct Record {
  std::string kernel;
  u32 blocks;
  Counter counter;
};

std::recursive_mutex mutex;
const Module* module_in_use = nullptr;
Bounds bounds;
bool bounded = false;
bool counting = false;
std::vector<Record> records;

constexpr u32 kMostThreads = 1024;
constexpr u64 kFirstPage = 4096;

}  // namespace

// The threads of a block; where they wait for each other, each is a fiber.
class Block {
 public:
  Block(const Kernel& kernel, Arguments& arguments, Counter* counter, u32 block, u32 threads,
        u32 blocks)
      : kernel_(kernel),
        arguments_(arguments),
        counter_(counter),
        shared_(kernel.shared_size),
        waits_(threads) {
    for (u32 i = 0; i < threads; ++i) threads_.emplace_back(i, *this, block, threads, blocks);
  }

  void run() {
    if (kernel_.waits) {
      run_fibers();
    } else {
      for (u32 i = 0; i < threads_.size(); ++i) run_thread(this, i);
    }
    if (!fault_.empty()) throw Fault(fault_);
    if (counter_ != nullptr) counter_->end_block();
  }

  char* locate(const Access& access, u32 thread) {
    if (access.address % access.size != 0) throw Fault(describe(access, "misaligned"));
    if (access.space == Space::shared) return shared_.locate(access, thread);
    if (access.space == Space::param) return arguments_.locate(access);
    if (access.address < kFirstPage) throw Fault(describe(access, "null"));
    if (bounded) bounds.check(access);
    if (counter_ != nullptr) counter_->add(access, thread);
    return reinterpret_cast<char*>(access.address);
  }

  void wait(u32 thread, int site) {
    waits_[thread] = {site, false, 0, 0};
    fibers()[thread].pause();
  }

  b32 shuffle(u32 thread, int site, b32 given, u32 lane) {
    waits_[thread] = {site, true, given, lane};
    fibers()[thread].pause();
    return waits_[thread].given;
  }

 private:
  static constexpr int kDone = -1;

  // Where a thread waits: for its block at a barrier, or for its warp, and for what of it.
  struct Wait {
    int site;
    bool shuffles;
    b32 given;
    u32 lane;
  };

  static std::array<Fiber, kMostThreads>& fibers() {
    static auto* const all = new std::array<Fiber, kMostThreads>;
    return *all;
  }

  // Nothing is thrown from one stack to another.
  static void run_thread(void* block, u32 index) {
    auto* const self = static_cast<Block*>(block);
    try {
      self->kernel_.run(self->threads_[index]);
    } catch (const Fault& fault) {
      self->note(index, fault.what());
    }
    self->waits_[index] = {kDone, false, 0, 0};
  }

  void note(u32 thread, const std::string& what) {
    if (!fault_.empty()) return;
    fault_ = what + ", thread " + std::to_string(thread) + " of block " +
             std::to_string(threads_[thread].block) + " of " + kernel_.name;
  }

  // The last thread goes first, so that what it is to wait for has not happened yet.
  void run_fibers() {
    const auto each = [&](auto call) {
      for (u32 i = threads_.size(); i-- > 0 && fault_.empty();) call(i, fibers()[i]);
    };
    each([&](u32 i, Fiber& fiber) { fiber.start(&run_thread, this, i); });
    while (fault_.empty()) {
      if (shuffle()) continue;
      if (!fault_.empty() || !meet()) break;
      shared_.pass_barrier();
      each([](u32, Fiber& fiber) { fiber.resume(); });
    }
    for (u32 i = 0; i < threads_.size(); ++i) {
      if (waits_[i].site != kDone) fibers()[i].abandon();
    }
  }

  // Whether any warp waited for itself, which has gone on then.
  bool shuffle() {
    bool any = false;
    for (u32 first = 0; first < threads_.size(); first += Thread::kWarp) {
      const u32 end = std::min<u32>(first + Thread::kWarp, threads_.size());
      const Wait wait = waits_[first];
      const auto asks = [&](u32 i) { return waits_[i].shuffles; };
      bool all = true, some = false;
      for (u32 i = first; i < end; ++i) {
        some = some || asks(i);
        all = all && asks(i) && waits_[i].site == wait.site && first + waits_[i].lane < end;
      }
      if (!some) continue;
      if (!all) {
        note(first, "threads of a warp that shuffle elsewhere, or not");
        return false;
      }
      std::vector<b32> got;
      for (u32 i = first; i < end; ++i) got.push_back(waits_[first + waits_[i].lane].given);
      for (u32 i = first; i < end; ++i) waits_[i].given = got[i - first];
      for (u32 i = end; i-- > first && fault_.empty();) fibers()[i].resume();
      any = true;
    }
    return any;
  }

  // Whether all are at one barrier; false at the end.
  bool meet() {
    for (u32 i = 0; i < threads_.size(); ++i) {
      if (waits_[i].site != waits_[0].site) note(i, "threads at different barriers, or gone");
    }
    return waits_[0].site != kDone;
  }

  const Kernel& kernel_;
  Arguments& arguments_;
  Counter* counter_;
  SharedMemory shared_;
  std::vector<Thread> threads_;
  std::vector<Wait> waits_;
  std::string fault_;
};

char* Thread::locate(const Access& access) { return its_.locate(access, index); }

void Thread::barrier(int site) { its_.wait(index, site); }

b32 Thread::shuffle(int site, b32 given, u32 lane, bool whole_warps) {
  if (!whole_warps) throw Fault("a shuffle of a part of a warp");
  return its_.shuffle(index, site, given, lane);
}

namespace {

void launch(const Kernel& kernel, u32 blocks, u32 threads, void** values) {
  if (blocks == 0 || threads == 0 || threads > std::min(kernel.most_threads, kMostThreads)) {
    throw Fault("invalid configuration of a launch of " + kernel.name);
  }
  Counter counter;
  Arguments arguments(kernel, values);
  for (u32 block = 0; block < blocks; ++block) {
    Block(kernel, arguments, counting ? &counter : nullptr, block, threads, blocks).run();
  }
  if (counting) records.push_back({kernel.name, blocks, counter});
}

// As JSON: of each launch its kernel, its blocks, and each site's traffic.
std::string report() {
  std::ostringstream out;
  const char* comma = "";
  out << '[';
  for (const Record& record : records) {
    out << comma << "[\"" << record.kernel << "\", " << record.blocks << ", [";
    comma = "";
    for (const auto& [site, t] : record.counter.sites()) {
      out << comma << '[' << t.store << ", " << t.requests << ", " << t.lanes << ", " << t.bytes
          << ", " << t.sectors << ']';
      comma = ", ";
    }
    out << "]]";
    comma = ", ";
  }
  out << ']';
  return out.str();
}

}  // namespace
}  // namespace ptx

// --- for Python and for the stand-in of CUDA's runtime
// ---------------------------------------------

extern "C" {

int ptx_driver_version = 13000;

using Locked = std::lock_guard<std::recursive_mutex>;

// A module of translated kernels; nullptr if it cannot be loaded.
const ptx::Module* ptx_open(const char* path) {
  static ptx::Module* loaded;
  const Locked locked(ptx::mutex);
  void* const library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) return nullptr;
  using Add = void (*)(const ptx::Kernel&);
  const auto list = reinterpret_cast<void (*)(Add)>(dlsym(library, "ptx_register_kernels"));
  if (list == nullptr) return nullptr;
  loaded = new ptx::Module;
  list([](const ptx::Kernel& kernel) { loaded->kernels.insert({kernel.name, kernel}); });
  return loaded;
}

// Whose kernels compiled launches find.
void ptx_use(const ptx::Module* module) { ptx::module_in_use = module; }

const ptx::Kernel* ptx_find(const ptx::Module* module, const char* name) {
  if (module == nullptr) module = ptx::module_in_use;
  if (module == nullptr) return nullptr;
  const auto found = module->kernels.find(name);
  return found == module->kernels.end() ? nullptr : &found->second;
}

// What went wrong; nullptr if nothing did.
const char* ptx_launch(const ptx::Kernel* kernel, uint32_t blocks, uint32_t threads,
                       void** arguments) {
  static std::string fault;
  const Locked locked(ptx::mutex);
  try {
    ptx::launch(*kernel, blocks, threads, arguments);
    return nullptr;
  } catch (const ptx::Fault& found) {
    fault = found.what();
    return fault.c_str();
  }
}

void ptx_allow(uint64_t begin, uint64_t size) {
  const Locked locked(ptx::mutex);
  ptx::bounds.allow(begin, size);
}

void ptx_forbid(uint64_t begin) {
  const Locked locked(ptx::mutex);
  ptx::bounds.forbid(begin);
}

// Whether kernels are held to what is allowed.
void ptx_bound(int on) { ptx::bounded = on != 0; }

void ptx_count(int on) {
  ptx::counting = on != 0;
  ptx::records.clear();
}

const char* ptx_report() {
  static std::string text;
  text = ptx::report();
  return text.c_str();
}

}  // extern "C"
