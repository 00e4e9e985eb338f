// Threads of execution that take turns on one thread of the system's. Entering a stack takes calls
// of the kernel, so each is entered once and then jumped to.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <cstdint>
#include <memory>

namespace ptx {

class Fiber {
 public:
  using Job = void (*)(void* of, uint32_t index);

  // Runs `job(of, index)` until it pauses or ends.
  void start(Job job, void* of, uint32_t index) {
    job_ = job;
    of_ = of;
    index_ = index;
    done_ = false;
    resume();
  }

  void resume() {
    if (_setjmp(outside()) != 0) return;
    if (entered_) _longjmp(inside_, 1);
    entered_ = true;
    enter();
  }

  // Called by the job.
  void pause() {
    if (_setjmp(inside_) == 0) _longjmp(outside(), 1);
  }

  bool done() const { return done_; }
  // What it was in the middle of never goes on.
  void abandon() { entered_ = false; }

 private:
  static constexpr size_t kStackSize = 64 << 10;

  static jmp_buf& outside() {
    static jmp_buf place;
    return place;
  }

  void enter() {
    ucontext_t context;
    getcontext(&context);
    if (stack_ == nullptr) stack_.reset(new char[kStackSize]);
    context.uc_stack.ss_sp = stack_.get();
    context.uc_stack.ss_size = kStackSize;
    context.uc_link = nullptr;
    const auto self = reinterpret_cast<uint64_t>(this);
    makecontext(&context, reinterpret_cast<void (*)()>(&run), 2, static_cast<unsigned>(self),
                static_cast<unsigned>(self >> 32));
    setcontext(&context);
  }

  static void run(unsigned low, unsigned high) {
    auto* const self = reinterpret_cast<Fiber*>(static_cast<uint64_t>(high) << 32 | low);
    for (;;) {
      self->job_(self->of_, self->index_);
      self->done_ = true;
      self->pause();
    }
  }

  std::unique_ptr<char[]> stack_;
  jmp_buf inside_;
  Job job_ = nullptr;
  void* of_ = nullptr;
  uint32_t index_ = 0;
  bool entered_ = false;
  bool done_ = false;
};

}  // namespace ptx
