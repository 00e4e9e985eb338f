// How one device's rows become launches. Knows no device: tests look at models that fit none.
#pragma once

#include <cstdint>
#include <vector>

#include "../formats/rows.h"
#include "tables.h"

namespace ranger::cuda {

// The chunks of all rows of one kind.
struct Launch {
  FormatId format;
  bool strided;
  bool has_slow;  // any of them
  int64_t first_chunk;
  int64_t chunk_count;
};

// Consecutive rows whose groups and gradients one launch of the schedule kernel takes.
struct ScheduleLaunch {
  int32_t first_row;
  int32_t row_count;
  int32_t first_group;
  int32_t group_count;

  int32_t words() const { return group_count * kGroupWords + row_count; }
};

struct Geometry {
  std::vector<int32_t> order;  // rows as they stand on the device: indices into the optimizer's
  std::vector<ChunkRef> chunks;
  std::vector<ScheduleLaunch> schedules;
  std::vector<Launch> launches;  // one for each kind
  std::vector<ChunkRef> slices;  // of rows whose gradients are centralized, kSlices of a row each
  // Where those go: for each row, as they stand on the device, in bytes from the first of all; and
  // how many bytes there are.
  std::vector<int64_t> scratch;
  int64_t scratch_size = 0;
};

// `launcher`: whose rows they are. `words`: of arguments that a schedule's launch takes.
Geometry make_geometry(const std::vector<TensorRow>& rows, int32_t launcher, int32_t words);

// Whether any stream of the row is not consecutive.
inline bool is_strided(const TensorRow& row) { return row.layout != nullptr; }

}  // namespace ranger::cuda
