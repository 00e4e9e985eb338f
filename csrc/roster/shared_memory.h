// Which rows share memory with others, or with themselves, so that kernels would race for it.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

#include "../formats/rows.h"

namespace ranger {

// Of no row.
constexpr int32_t kNoRow = -1;

// Bytes that a row reads, or also writes.
struct Span {
  uintptr_t begin;
  uintptr_t end;
  int32_t position;
  bool written;
};

// The spans of all rows that move; `gradients`: with those that they read.
std::vector<Span> active_spans(const Rows& rows, bool gradients);

// The positions of rows of which a span overlaps another that is written, in order.
std::vector<int32_t> sharing_memory(std::vector<Span> spans);

// What all rows write, kept in order from step to step.
class WrittenMemory {
 public:
  // False only if no row that moves writes to what another one, or itself, reads or writes
  // otherwise. Resting rows are taken where they lay last, which can only raise a suspicion.
  bool may_be_shared(const Rows& rows, bool gradients);

 private:
  void update(const Rows& rows);

  std::vector<std::pair<uintptr_t, uintptr_t>> spans_;
  int64_t version_ = -1;
  bool overlaps_ = false;
};

}  // namespace ranger
