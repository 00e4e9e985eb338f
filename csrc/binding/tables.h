// What the tables are made of, for the tests that hold Python's and Triton's against them.
#pragma once

#include <pybind11/pybind11.h>

#include <cstddef>

#include "../cuda/tables.h"
#include "../formats/formats.h"

namespace ranger {

// The rows of RANGER_FORMATS: name, the arithmetic's dtype, and the codecs of param, exp_avg,
// exp_avg_sq, slow_param and outer_momentum_buffer.
inline pybind11::list format_rows() {
  pybind11::list rows;
  for (const FormatInfo& format : kFormatInfos) {
    const auto name = [&](Stream stream) { return info_of(format.codecs[stream]).name; };
    rows.append(pybind11::make_tuple(format.name, info_of(format.value).name, name(kParam),
                                     name(kExpAvg), name(kExpAvgSq), name(kSlowParam),
                                     name(kOuterMomentumBuffer)));
  }
  return rows;
}

// The codecs: name, dtype, that of what is stored beside it or None, whether it rounds
// stochastically, and whether elements share something.
inline pybind11::list codec_rows() {
  pybind11::list rows;
  for (const CodecInfo& codec : kCodecInfos) {
    const pybind11::object rest = codec.has_rest()
                                      ? pybind11::object(pybind11::str(info_of(codec.rest).name))
                                      : pybind11::object(pybind11::none());
    rows.append(pybind11::make_tuple(codec.name, info_of(codec.stored).name, rest, codec.is_random,
                                     codec.is_grouped));
  }
  return rows;
}

// Where the fields of the device tables stand, in 8-byte words: the Triton kernels have the same.
inline pybind11::dict table_layout() {
  const auto words = [](size_t bytes) { return bytes / 8; };
  pybind11::dict layout;
  layout["row_words"] = words(sizeof(cuda::DeviceRow));
  layout["numel"] = words(offsetof(cuda::DeviceRow, numel));
  layout["step"] = words(offsetof(cuda::DeviceRow, step));
  layout["layout"] = words(offsetof(cuda::DeviceRow, layout));
  layout["first"] = words(offsetof(cuda::DeviceRow, first));
  layout["group"] = words(offsetof(cuda::DeviceRow, group));
  layout["slice"] = words(offsetof(cuda::DeviceRow, slice));
  layout["scratch"] = words(offsetof(cuda::DeviceRow, scratch));
  layout["place"] = words(offsetof(cuda::DeviceRow, place));
  layout["rest_of"] = kRestOf;
  layout["scalar_words"] = words(sizeof(cuda::RowScalars));
  layout["coefficients"] = words(offsetof(cuda::RowScalars, f64));
  layout["keys"] = words(offsetof(cuda::RowScalars, keys));
  layout["group_words"] = cuda::kGroupWords;
  layout["seed"] = words(offsetof(Hyperparameters, seed));
  layout["active"] = cuda::kActive;
  layout["rectified"] = cuda::kRectified;
  layout["l2"] = cuda::kL2;
  layout["sync"] = cuda::kSync;
  layout["outer"] = cuda::kOuter;
  layout["bounded"] = cuda::kBounded;
  return layout;
}

}  // namespace ranger
