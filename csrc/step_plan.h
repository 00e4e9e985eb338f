// The plan as Python holds it: the rows of an optimizer's parameters, found again and checked at
// every step without a loop in Python.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <deque>
#include <memory>
#include <string>
#include <vector>

#include "cpu/launch.h"
#include "cuda/launch.h"
#include "plan.h"
#include "tensor_exchange.h"

namespace ranger {

// A step is two calls: collect() reads, checks and allocates, and changes nothing; launch() can
// fail only where a device does. Other threads may run in both; the caller lets one at a time in.
class StepPlan {
 public:
  enum class Rule { kRadam, kLookahead };

  // `plain(param)`: a DTensor's or complex parameter's memory as a real tensor.
  // `plain_grad(param, name)`: likewise its gradient, if the kernels cannot read it as it is; may
  // raise. Neither may hold the plan: Python's garbage collector does not see into it.
  StepPlan(Rule rule, const pybind11::capsule& exchange_api, pybind11::object plain,
           pybind11::object plain_grad);
  ~StepPlan();
  StepPlan(const StepPlan&) = delete;
  StepPlan& operator=(const StepPlan&) = delete;

  // One of these for each parameter, in the order of the groups, then finish().
  //
  // A parameter that this plan moves. `backend`: whose kernels do it: "cpu", "cuda", or "triton",
  // which are launched from Python with what rows() and gradients() tell. `state`: its entry in the
  // optimizer's state. `streams`: the names of the state tensors that are kExpAvg, kExpAvgSq and
  // kSlowParam, None where there is none; `step_name`: that of the step count, a float32 scalar on
  // the kernels' device. `name`: what errors call the parameter.
  void add_row(pybind11::object param, int32_t group, pybind11::str name,
               const std::string& backend, pybind11::dict state, const pybind11::sequence& streams,
               pybind11::str step_name);
  // A parameter without state: the plan holds as long as it has no gradient.
  void add_idle(pybind11::object param, int32_t group);
  // A parameter that is none of this plan's business.
  void add_foreign(pybind11::object param, int32_t group);
  void finish(const pybind11::dict& optimizer_state);

  // Whether the plan still describes this optimizer; if so, the rows that move now are noted.
  // `moved`: for each parameter whether it moves; None: those that have a gradient.
  bool collect(const pybind11::list& param_groups, const pybind11::dict& optimizer_state,
               const pybind11::object& moved);

  // What launch() needs: the CUDA devices among the rows', and whether any row is the CPU's.
  std::vector<int32_t> devices() const;
  bool has_cpu_rows() const { return has_cpu_rows_; }

  // What the CPU's rows multiply their gradients by: see grad_scale().
  struct Scaling {
    double unscale;
    double norm;
  };
  // What a device's rows read there: tensors on that device, or None.
  struct Signals {
    pybind11::object grad_scale;
    pybind11::object found_inf;
    pybind11::object norm;
    std::vector<pybind11::object> lr;  // of each group
  };

  // Counts a step for the collected rows and runs the rule on them; the caller has what hold()
  // returned. `hypers`: one for each group. `signals`: one for each of devices().
  void launch(const std::vector<Hyperparameters>& hypers, const Scaling& scaling,
              const std::vector<Signals>& signals, int num_threads);

  // For launches from Python, the rows: (numel, is_float64, group, the step count's address, sizes,
  // each stream's address and strides), as TensorRow has them; 0 for a stream that is not there,
  // and for the gradient.
  pybind11::list rows() const;
  // For each row the address of its gradient in the step that was collected: 0 where it rests, 1
  // where there is nothing to read.
  pybind11::list gradients() const;
  // How many times a gradient had other strides than before.
  int64_t layout_changes() const { return layout_changes_; }

  // Keeps the memory of the rows' state alive as long as the result is. Throws if that state has
  // been replaced, as other threads may between collect() and what follows it.
  pybind11::object hold() const;

  // The parameters that move in the step that was collected, as far as they are there.
  pybind11::list moved() const;

  // Lets go of the gradients of a collect() that no launch() here follows.
  void release() { gradients_.clear(); }

  // Parameters and slow weights change places, those of all rows. After a collect(); the caller
  // holds their memory.
  void swap(int num_threads);

 private:
  enum class Kind : int8_t { kRow, kIdle, kForeign };

  struct Entry {
    PyObject* param;  // watched
    int32_t group;
    int32_t row;  // -1 unless kRow
    Kind kind;
    bool is_plain;      // false: described through plain()
    bool has_own_grad;  // its type's `grad` is not torch.Tensor's
    pybind11::str name;
  };

  // One item of a parameter's state.
  struct StateItem {
    pybind11::object name;
    PyObject* tensor;  // watched; nullptr for what the kernels do not touch
    TensorKey memory;
    bool is_plain;  // false: a DTensor or complex, described through plain()
  };

  // What of a row belongs to Python.
  struct RowKey {
    TensorKey param;
    std::vector<int32_t> order;  // the memory order of the parameter's dimensions
    std::vector<StateItem> state;
  };

  struct StateEntry {
    PyObject* key;  // compared, never followed
    int32_t row;    // -1: not one of this plan's
  };

  bool find_active(const pybind11::list& param_groups, const pybind11::dict& optimizer_state,
                   const pybind11::object& moved);
  bool collect_row(const Entry& entry, PyObject* param, PyObject* grad);
  bool bind_gradient(const Entry& entry, PyObject* grad);
  static bool same_items(const std::vector<StateItem>& items, PyObject* state);
  bool state_is_unchanged(const pybind11::dict& optimizer_state);
  bool probe_memory();
  void require_state() const;
  bool is_unmoved(const StateItem& item) const;
  void check_count(const Entry& entry) const;
  PyObject* watch(pybind11::handle object);
  Entry& add_entry(pybind11::object param, int32_t group, Kind kind);
  void launch_on_cpu(const std::vector<Hyperparameters>& hypers, const Scaling& scaling,
                     int num_threads);
  void launch_on(cuda::DevicePlan& device, const std::vector<Hyperparameters>& hypers,
                 const Signals& signals);
  cuda::DeviceScalar scalar_of(const pybind11::object& tensor, int32_t device) const;
  void bind_state(TensorRow& row, RowKey& key, const pybind11::dict& state,
                  const pybind11::sequence& streams, const pybind11::str& step_name);
  bool describes_itself(pybind11::handle tensor, const TensorKey& key) const;

  Rule rule_;
  TensorExchange exchange_;
  pybind11::object plain_;
  pybind11::object plain_grad_;

  // Weak references to every watched object. One that goes takes the plan with it, so an address
  // that is used again is never trusted, and a step compares addresses without following one. Only
  // the state's memory is held, since it is not looked at every step, and only as long as its
  // tensors are there and no launch is under way.
  struct Life {
    bool outlived = false;
    std::shared_ptr<std::vector<pybind11::object>> memory =
        std::make_shared<std::vector<pybind11::object>>();
  };
  std::shared_ptr<Life> life_ = std::make_shared<Life>();
  pybind11::cpp_function on_death_;
  std::vector<pybind11::weakref> watches_;

  std::vector<Entry> entries_;
  std::vector<TensorRow> rows_;
  std::vector<RowKey> keys_;
  std::vector<StateEntry> state_entries_;
  int64_t layout_changes_ = 0;
  std::vector<Chunk> chunks_;  // of the CPU's rows
  bool has_cpu_rows_ = false;
  bool is_for_python_ = false;
  std::vector<cuda::DevicePlan> devices_;
  size_t probe_ = 0;

  // The step under way.
  std::vector<char> active_;  // for each row
  bool reads_gradients_ = false;
  std::vector<pybind11::object> gradients_;  // alive until the launch is over
  std::deque<cpu::StepScalars> scalars_;
  cpu::RowScalars row_scalars_;
};

}  // namespace ranger
