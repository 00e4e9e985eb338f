#include "shared_memory.h"

#include <algorithm>

namespace ranger {
namespace {

void append_span(const void* data, int64_t bytes, int32_t position, bool written,
                 std::vector<Span>& spans) {
  const auto begin = reinterpret_cast<uintptr_t>(data);
  if (data == nullptr || bytes <= 0) return;
  spans.push_back({begin, begin + static_cast<uintptr_t>(bytes), position, written});
}

void append_spans(const TensorRow& row, int32_t position, bool gradient, std::vector<Span>& spans) {
  for (int tensor = 0; tensor < kTensors; ++tensor) {
    if (tensor == kGrad && !gradient) continue;
    append_span(row.data[tensor], extent(row, tensor), position, tensor != kGrad, spans);
  }
  append_span(row.step, sizeof(float), position, true, spans);
}

}  // namespace

std::vector<Span> active_spans(const Rows& rows, bool gradients) {
  std::vector<Span> spans;
  for (size_t i = 0; i < rows.rows.size(); ++i) {
    const TensorRow& row = rows.rows[i];
    if (row.active) append_spans(row, static_cast<int32_t>(i), gradients, spans);
  }
  return spans;
}

std::vector<int32_t> sharing_memory(std::vector<Span> spans) {
  std::sort(spans.begin(), spans.end(),
            [](const Span& a, const Span& b) { return a.begin < b.begin; });
  int32_t last = kNoRow;
  for (const Span& span : spans) last = std::max(last, span.position);
  std::vector<bool> shares(last + 2);  // the first: of no row
  // Of the spans so far, those that reach beyond the begin of the next one.
  std::vector<const Span*> written;
  std::vector<const Span*> read;
  const auto meet = [&](std::vector<const Span*>& before, const Span& span) {
    const auto ended = [&](const Span* other) { return other->end <= span.begin; };
    before.erase(std::remove_if(before.begin(), before.end(), ended), before.end());
    for (const Span* other : before) {
      if (other->position == kNoRow && span.position == kNoRow) continue;
      shares[other->position + 1] = shares[span.position + 1] = true;
    }
  };
  for (const Span& span : spans) {
    meet(written, span);
    if (span.written) meet(read, span);
    (span.written ? written : read).push_back(&span);
  }
  std::vector<int32_t> positions;
  for (int32_t i = 0; i <= last; ++i) {
    if (shares[i + 1]) positions.push_back(i);
  }
  return positions;
}

void WrittenMemory::update(const Rows& rows) {
  std::vector<Span> spans;
  for (const TensorRow& row : rows.rows) append_spans(row, 0, false, spans);
  spans_.clear();
  for (const Span& span : spans) spans_.emplace_back(span.begin, span.end);
  std::sort(spans_.begin(), spans_.end());
  overlaps_ = false;
  for (size_t i = 1; i < spans_.size(); ++i) {
    overlaps_ = overlaps_ || spans_[i].first < spans_[i - 1].second;
  }
  version_ = rows.version;
}

bool WrittenMemory::may_be_shared(const Rows& rows, bool gradients) {
  if (version_ != rows.version) update(rows);
  if (overlaps_) return true;
  if (!gradients || spans_.empty()) return false;
  for (const TensorRow& row : rows.rows) {
    if (!row.active || row.numel == 0) continue;
    const auto begin = reinterpret_cast<uintptr_t>(row.data[kGrad]);
    const uintptr_t end = begin + static_cast<uintptr_t>(extent(row, kGrad));
    // The last that begins before the gradient's end, without a branch to predict.
    const std::pair<uintptr_t, uintptr_t>* first = spans_.data();
    for (size_t count = spans_.size(); count > 1;) {
      const size_t half = count / 2;
      first += first[half].first < end ? half : 0;
      count -= half;
    }
    if (first->first < end && begin < first->second) return true;
  }
  return false;
}

}  // namespace ranger
