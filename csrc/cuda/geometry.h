// How one device's rows become launches. Knows no device: tests look at models that fit none.
#pragma once

#include <cstdint>
#include <vector>

#include "../rows.h"
#include "tables.h"

namespace ranger::cuda {

// Consecutive rows of one kind, and all their chunks.
struct Launch {
  DType dtype;
  bool strided;
  int32_t first_row;
  int32_t row_count;
  int64_t first_chunk;
  int64_t chunk_count;
};

struct ScheduleLaunch {
  int32_t first_row;
  int32_t row_count;
  int32_t first_group;
};

struct Geometry {
  std::vector<int32_t> order;  // rows as they stand on the device: indices into the optimizer's
  std::vector<ChunkRef> chunks;
  std::vector<ScheduleLaunch> schedules;
  std::vector<Launch> steps;   // as many rows as their gradients' addresses fit
  std::vector<Launch> passes;  // without gradients: one for each kind
};

// `launcher`: whose rows they are. `capacity`: gradient addresses that a launch takes.
Geometry make_geometry(const std::vector<TensorRow>& rows, int32_t launcher, int32_t capacity);

// Whether any stream of the row is not consecutive.
inline bool is_strided(const TensorRow& row) { return row.layout != nullptr; }

}  // namespace ranger::cuda
