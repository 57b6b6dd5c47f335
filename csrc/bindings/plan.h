// The plan of one optimizer: what is remembered between steps, and the phases of a step.
#pragma once

#include <pybind11/pybind11.h>

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "bindings/cuda.h"
#include "bindings/group_reader.h"
#include "bindings/ownership.h"
#include "bindings/param_reader.h"
#include "bindings/rule_driver.h"
#include "bindings/step_lock.h"
#include "bindings/step_work.h"

namespace onepass {

// How many tensors have been stepped since import: by kernels for each backend, and by torch's implementation for each
// reason.
struct Stats {
  std::map<std::string, std::uint64_t> kernel{{"cpu", 0}, {"cuda", 0}};
  std::map<std::string, std::uint64_t> torch;
};
Stats& stats();

class Plan {
 public:
  // `first_param` is the number of the optimizer's first parameter in the whole optimizer of which it is a part. Random
  // bits depend on it. Throws std::invalid_argument if there is no such rule.
  Plan(const std::string& rule, std::size_t first_param);

  // Reads the optimizer, checks everything, creates missing states, and steps all parameters. Returns a StepResult.
  // If torch's implementation has to step some parameters, nothing is done and the result names them, with the measures
  // of the others' gradients; a second request with `fallback_stepped` steps the others. Its result may name more
  // parameters, if new states do not have the formats of kernels; then the request is repeated. With GradScaler's
  // values, nothing is done unless the whole step is made and counted on their GPU. On an exception nothing has been
  // written.
  pybind11::object step(const pybind11::object& optimizer, const StepRequest& request);

  // Returns (group, index) of the parameters with gradients that kernels can step, and (group, index, reason) of the
  // others. Throws the exceptions of `step`.
  std::pair<pybind11::list, pybind11::list> divide(const pybind11::object& optimizer);

  // Returns how `step` would step each parameter: (group, index, path, reason). path is "kernel", "torch" or "error".
  pybind11::list explain(const pybind11::object& optimizer, StepRequest request);

  // For Python's garbage collector.
  int traverse(visitproc visit, void* arg) const { return groups_.traverse(visit, arg); }
  void clear() { groups_.clear(); }

 private:
  // The phases of reading. The first two may run Python code; the work holds references to what they read.
  void read_groups(const pybind11::object& optimizer, StepWork& work);
  void read_gradients(const StepRequest& request, StepWork& work);
  void match_states(StepWork& work);
  void read_params(const StepRequest& request, StepWork& work);
  bool find_shared_memory();

  void read_until_stable(const StepRequest& request, StepWork& work);
  void read(const pybind11::object& optimizer, const StepRequest& request, StepWork& work);
  void create_states(const pybind11::object& optimizer, const StepRequest& request, StepWork& work,
                     const pybind11::list& created);
  void zero_low_bits(const StepRequest& request, StepWork& work);
  void discard_states_of_fallbacks(const pybind11::object& optimizer, const StepWork& work,
                                   const pybind11::list& created);
  bool take_scaler(const StepRequest& request, StepWork& work);
  pybind11::object fallback_result(StepWork& work, const StepRequest& request) const;
  pybind11::list measures(StepWork& work, const StepRequest& request) const;
  Clipping clip(StepWork& work, const StepRequest& request, std::optional<Owned>& owned) const;
  static DecidedClipping decide(const StepWork& work, const StepRequest& request);
  static pybind11::object clip_on_gpu(StepWork& work, const StepRequest& request);
  bool may_skip_on_gpu(const StepWork& work, const StepRequest& request) const;
  bool stays_on_gpu(const StepWork& work, const StepRequest& request) const;
  void list_written(const StepWork& work, const StepRequest& request, pybind11::list& written) const;
  void note_written(const StepWork& work, const pybind11::list& written);
  void remember_versions(const StepWork& work) const;
  pybind11::list named(const std::vector<std::size_t>& numbers) const;
  pybind11::list unfollowed(const StepWork& work, std::size_t follower) const;
  pybind11::list unzeroed(const StepWork& work) const;
  ParamReader reader(const StepRequest& request, StepWork& work);

  std::unique_ptr<RuleDriver> driver_;
  std::size_t first_param_;
  RuleNames names_;
  GroupReader groups_;
  std::string label_;  // the optimizer's class name, for messages
  std::vector<Param> params_;
  std::vector<std::pair<PyObject*, PyObject*>> states_;  // items of optimizer.state at the last walk
  bool states_moved_ = true;
  bool memory_moved_ = true;
  StepMutex mutex_;
};

void define_plan(pybind11::module_& m);

}  // namespace onepass
