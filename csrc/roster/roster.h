// The rows of an optimizer, found, checked and described anew at every step: each address that a
// kernel uses is read from its tensor in the same step.
#pragma once

#include <pybind11/pybind11.h>

#include <array>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "../formats/rows.h"
#include "python_tensors.h"
#include "shared_memory.h"

namespace ranger {

// Python objects that are kept alive until release().
class Held {
 public:
  Held() = default;
  ~Held() { release(); }
  Held(const Held&) = delete;
  Held& operator=(const Held&) = delete;

  PyObject* keep(PyObject* borrowed) {
    Py_INCREF(borrowed);
    return keep_new(borrowed);
  }
  PyObject* keep_new(PyObject* owned);
  void release();

 private:
  std::vector<PyObject*> objects_;
};

// A step is collect(), which changes nothing, then each launcher's prepare() and launch(), then
// release(). Between collect() and release() the roster keeps the tensors alive that the launches
// read; at other times it keeps nothing.
class Roster {
 public:
  // `streams`: the names of the state tensors that are kExpAvg, kExpAvgSq, kSlowParam and
  // kOuterMomentumBuffer, None where the rule has none; the last is that of groups whose
  // "outer_momentum" is not 0, and does not count in others. `step_name`: that of the step count, a
  // float32 scalar beside its parameter. `dtensor`: the type. Functions of Python: `plain(tensor)`,
  // a tensor's own memory as a real tensor; `plain_grad(param)`, likewise its gradient, where the
  // kernels cannot read it as it is; `shard_of(dtensor)`, where in the whole its shard's elements
  // begin, whether it has whole slices along its first dimension, and of how many it is. None may
  // hold the roster: Python's garbage collector does not see into it. `first_place`: of the first
  // parameter of the groups, where these are not all of an optimizer's.
  Roster(const pybind11::capsule& exchange_api, const pybind11::sequence& streams,
         pybind11::str step_name, pybind11::object dtensor, pybind11::object plain,
         pybind11::object plain_grad, pybind11::object shard_of, int32_t first_place);

  // From now on tensors of the dtype and on the device of `tensor`, in groups of that
  // "weight_rounding" (empty: in any), are moved by that launcher, if they and their state are
  // stored as `format` says, a name of RANGER_FORMATS. The first that fits counts.
  void serve(const pybind11::object& tensor, const std::string& weight_rounding, int32_t launcher,
             const std::string& format);

  // Finds what moves: parameters by their position in the groups' order. `moved`: for each whether
  // it moves; None: those that have a gradient do, and it is read. Returns those that move and are
  // no rows, with whether that is because they share memory: Python has to say what is wrong, give
  // them the state they lack, or move them.
  // `hold`: keep their memory, not just the tensors, alive until release(), about a quarter of a
  // microsecond each. Without, it is what the tensors have only until other code of Python's runs.
  pybind11::list collect(const pybind11::sequence& param_groups, const pybind11::dict& state,
                         const pybind11::object& moved, bool hold);

  bool holds_memory() const { return holds_memory_; }

  // Leaves out of what was collected the rows that share memory with any of these tensors, and
  // returns their positions.
  pybind11::list leave_out(const pybind11::sequence& tensors);

  // In place of collect(), for swaps: pairs of tensors as kParam and kSlowParam. Returns the
  // positions of those that are no rows.
  pybind11::list pair(const pybind11::sequence& params, const pybind11::sequence& slow_params);

  // Lets go of what was collected. Nothing moves until the next collect().
  void release();

  const Rows& rows() const { return rows_; }
  const TensorExchange& exchange() const { return exchange_; }
  bool is_collected() const { return is_collected_; }
  int32_t group_count() const { return group_count_; }

  // The parameters of the rows that move.
  pybind11::list moved() const;

  // While there is one, the roster stays as it is: other threads may run.
  class Use {
   public:
    explicit Use(Roster& roster);
    ~Use() { roster_.in_use_ = false; }
    Use(const Use&) = delete;
    Use& operator=(const Use&) = delete;

   private:
    Roster& roster_;
  };

 private:
  static constexpr int kItems = kTensors + 1;  // and the step count
  static constexpr int kStep = kTensors;
  static constexpr int kNamed = 5;  // by the caller; those of what lies beside streams never differ
  static constexpr int kStateNames = kNamed + 5;
  static constexpr int kItemOf[kStateNames] = {kExpAvg,
                                               kExpAvgSq,
                                               kSlowParam,
                                               kOuterMomentumBuffer,
                                               kStep,
                                               kRestOf + kParam,
                                               kRestOf + kParam,
                                               kRestOf + kExpAvg,
                                               kRestOf + kExpAvgSq,
                                               kRestOf + kSlowParam};

  struct Member {
    PyObject* param;  // compared from step to step; followed only in the step it was found in
    int32_t group;
    bool again;             // a group names it twice; it moves once
    pybind11::object spec;  // of a DTensor, and what shard_of() said of it
    int64_t first;
    bool has_whole_slices;
    int32_t ndim;
  };
  struct StateEntry {
    PyObject* key;     // only ever compared
    int32_t position;  // of the parameter; -1: none of this optimizer's
  };
  struct Kind {
    DLDevice device;
    DType dtype;
    std::string weight_rounding;
    int32_t launcher;
    FormatId format;
  };
  struct Mover {
    int32_t position;
    PyObject* param;
    std::array<PyObject*, kItems> items;  // or what stands for them; nullptr: there is none
    std::array<bool, kItems> is_resolved;
    std::array<const void*, kItems> cleared;  // memory of which all is known that DLPack lacks
    bool is_refused;
  };
  enum class Outcome { kRow, kNeedsPython, kSharesMemory };
  using Described = std::array<DLTensor, kItems>;

  static int64_t next_version();  // no two states of any two rosters have the same
  void enlist(const pybind11::sequence& param_groups);
  void forget_slices();
  void find_movers(const pybind11::object& moved);
  PyObject* gradient_of(PyObject* param);
  void find_state(const pybind11::dict& state);
  void order_state(const pybind11::dict& state);
  void find_items(PyObject* state, Mover& mover);
  Outcome describe(Mover& mover);
  bool look_at_all(Mover& mover, Described& found);
  pybind11::list describe_all();
  void hold_memory();
  void forget();
  void find_shards(Mover& mover);
  bool is_dtensor(PyObject* tensor) const {
    return reinterpret_cast<PyObject*>(Py_TYPE(tensor)) == dtensor_.ptr();
  }
  bool reads(PyObject* tensor, const void** cleared, DLTensor* found);
  bool resolve(Mover& mover, int item);
  Outcome enter(const Mover& mover, const Described& found, bool is_pair);
  const Kind* kind_of(const Mover& mover, const Described& found, bool is_pair) const;
  bool has_state(const Mover& mover, const Described& found, const FormatInfo& format) const;
  const Member& shard_of(const Mover& mover);
  bool find_slice(const Mover& mover, const Shape& shape, int64_t& slice);
  void settle_shared_memory(pybind11::list& rest);

  TensorExchange exchange_;
  std::array<pybind11::object, kStateNames> names_;  // of the items in kItemOf
  pybind11::object dtensor_;
  pybind11::object plain_;
  pybind11::object plain_grad_;
  pybind11::object shard_of_;
  const int32_t first_place_;
  const Prefetcher prefetch_;
  std::vector<Kind> kinds_;

  // From step to step, to compare with.
  std::vector<Member> members_;
  std::vector<StateEntry> state_entries_;
  std::vector<std::string> weight_roundings_;  // of each group; empty: it has none
  std::vector<bool> have_outer_momentum_;      // likewise
  // Of how many dimensions at least gradients are centralized; 0: of none.
  std::vector<int32_t> centralized_dims_;
  int32_t group_count_ = 0;
  Rows rows_;
  WrittenMemory written_;

  // The step under way.
  Held held_;
  std::vector<Mover> movers_;
  std::vector<int32_t> mover_of_;                      // for each position; -1: it rests
  std::vector<std::pair<int32_t, PyObject*>> states_;  // of movers, while they are looked through
  bool reads_gradients_ = false;
  bool python_ran_ = false;  // while the rows were described
  bool is_collected_ = false;
  bool holds_memory_ = false;
  bool in_use_ = false;
};

}  // namespace ranger
