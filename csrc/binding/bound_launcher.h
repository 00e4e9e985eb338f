// A launcher as Python holds it: prepare, launch and swap, and a whole step in one call.
#pragma once

#include <pybind11/pybind11.h>

#include <algorithm>
#include <initializer_list>
#include <stdexcept>
#include <utility>
#include <vector>

#include "../roster/roster.h"

namespace ranger {

// Whatever is wrong with a call raises before anything is launched.
template <class Launcher>
class Bound {
 public:
  Bound(Rule rule, int32_t index, int device_type, Launcher launcher)
      : launcher_(std::move(launcher)), rule_(rule), index_(index), device_type_(device_type) {
    if (index < 0) throw pybind11::value_error("a launcher's index is at least 0");
  }
  // Freeing a device's memory waits for the device, and other threads need not.
  ~Bound() {
    const pybind11::gil_scoped_release released;
    const Launcher gone = std::move(launcher_);
  }
  Bound(const Bound&) = delete;
  Bound& operator=(const Bound&) = delete;

  void prepare(Roster& roster) {
    const Roster::Use use(roster);
    const InUse in_use(in_use_);
    prepare_rows(roster);
  }

  // Calls `run(launcher)` for a step of so many groups.
  template <class Run>
  void launch(Roster& roster, size_t groups, const Run& run) {
    const Roster::Use use(roster);
    const InUse in_use(in_use_);
    launch_rows(roster, groups, run);
  }

  // All of a step whose rows are all this launcher's, without another thread in between; nothing of
  // it if collect() leaves any.
  template <class Run>
  pybind11::list step(Roster& roster, const pybind11::sequence& param_groups,
                      const pybind11::dict& state, const pybind11::object& moved, size_t groups,
                      const Run& run) {
    const InUse in_use(in_use_);
    // Other threads may run while it works, if that is worth what holding the memory costs.
    const pybind11::list rest = roster.collect(param_groups, state, moved, is_large(roster));
    if (!rest.empty()) return rest;
    const Roster::Use use(roster);
    prepare_rows(roster);
    launch_rows(roster, groups, run);
    return rest;
  }

  // Calls `run(launcher)` for the norm of what collect() found.
  template <class Run>
  auto squares(Roster& roster, const Run& run) {
    const Roster::Use use(roster);
    const InUse in_use(in_use_);
    require_prepared(roster);
    for (const TensorRow& row : roster.rows().rows) {
      if (row.launcher != index_ || !row.active) continue;
      if (!has(row, {kGrad})) throw pybind11::value_error("a norm is of gradients");
    }
    if (!roster.holds_memory()) return run(launcher_);
    const pybind11::gil_scoped_release released;
    return run(launcher_);
  }

  // Calls `run(launcher)` for a swap.
  template <class Run>
  void swap(Roster& roster, const Run& run) {
    const Roster::Use use(roster);
    const InUse in_use(in_use_);
    require_prepared(roster);
    if (!roster.holds_memory()) throw std::runtime_error("a swap comes after pair()");
    for (const TensorRow& row : roster.rows().rows) {
      if (row.launcher == index_ && !(row.active && has(row, {kParam, kSlowParam}))) {
        throw pybind11::value_error("a swap is of pairs");
      }
    }
    const pybind11::gil_scoped_release released;
    run(launcher_);
  }

  const Launcher& launcher() const { return launcher_; }

 private:
  // Other threads may run while a launcher works.
  struct InUse {
    explicit InUse(bool& flag) : flag(flag) {
      if (flag) throw std::runtime_error("the launcher is in use, in another thread");
      flag = true;
    }
    ~InUse() { flag = false; }
    bool& flag;
  };

  void prepare_rows(const Roster& roster) {
    for (const TensorRow& row : roster.rows().rows) {
      if (row.launcher == index_ && row.device_type != device_type_) {
        throw pybind11::value_error("rows of this launcher are on another device");
      }
    }
    launcher_.prepare(roster.rows());
  }

  template <class Run>
  void launch_rows(const Roster& roster, size_t groups, const Run& run) {
    require_prepared(roster);
    if (static_cast<size_t>(roster.group_count()) != groups) {
      throw pybind11::value_error("there must be hyperparameters for each group");
    }
    for (const TensorRow& row : roster.rows().rows) {
      if (row.active && row.launcher == index_ && !is_complete(row)) {
        throw pybind11::value_error("a row lacks a tensor that this launcher's rule needs");
      }
    }
    if (!roster.holds_memory()) {
      run(launcher_);
      return;
    }
    const pybind11::gil_scoped_release released;
    run(launcher_);
  }

  // As the rows were in the last step.
  static bool is_large(const Roster& roster) {
    constexpr int64_t kElements = 65536;  // of a row, on average
    const std::vector<TensorRow>& rows = roster.rows().rows;
    int64_t elements = 0;
    for (const TensorRow& row : rows) elements += row.numel;
    return elements > kElements * static_cast<int64_t>(rows.size());
  }

  void require_prepared(const Roster& roster) const {
    if (!roster.is_collected() || launcher_.prepared_version() != roster.rows().version) {
      throw std::runtime_error("a launch comes after collect() and prepare()");
    }
  }
  static bool has(const TensorRow& row, std::initializer_list<Stream> streams) {
    const auto is_there = [&](Stream stream) { return row.data[stream] != nullptr; };
    return row.numel == 0 || std::all_of(streams.begin(), streams.end(), is_there);
  }
  bool is_complete(const TensorRow& row) const {
    return row.step != nullptr &&
           (rule_ == Rule::kRadam ? has(row, {kParam, kGrad, kExpAvg, kExpAvgSq})
                                  : has(row, {kParam, kSlowParam}));
  }

  Launcher launcher_;
  Rule rule_;
  int32_t index_;
  int device_type_;
  bool in_use_ = false;
};

}  // namespace ranger
