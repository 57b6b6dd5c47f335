// One step: what it is asked to do, what it works on, and what came of it. Made for the step, and gone after it.
#pragma once

#include <pybind11/pybind11.h>

#include <array>
#include <cstddef>
#include <list>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "cpu/factored.h"
#include "cpu/rows.h"
#include "cuda/step.h"
#include "job.h"
#include "rules/registry.h"

namespace onepass {

// -- request and result ----------------------------------------------------------------------------------------------

// A follower of every parameter: a state that is updated from the new parameter, f += weight * (p - f).
struct FollowerRequest {
  std::string label;  // for messages
  pybind11::str state_name;
  std::optional<double> weight;  // none: it stays as it is in this step
  bool sets_param = false;       // and then p = f
};

struct StepRequest {
  double grad_factor = 1.0;  // what gradients are multiplied by
  int threads = 1;
  std::vector<FollowerRequest> followers;
  bool fallback_stepped = false;  // torch's code has stepped the parameters of the last result's `fallback`
  // GradScaler's two values in a GPU's memory (each a tensor or None): for steps that are made and counted on that GPU.
  pybind11::object grad_scale = pybind11::none();
  pybind11::object found_inf = pybind11::none();

  bool has_scaler() const { return !grad_scale.is_none() || !found_inf.is_none(); }
};

// In Python a struct sequence, whose fields are read in a tenth of the time that a property takes.
struct StepResult {
  bool stepped = false;       // false: nothing was done
  pybind11::list fallback;    // (group, index, reason) of parameters that torch's code has to step first
  pybind11::list unfollowed;  // parameters whose followers this step has not updated

  pybind11::object to_python() const;
};

PyTypeObject* step_result_type();

// -- work ------------------------------------------------------------------------------------------------------------

// A scalar that is kept for each parameter (`step` or one of the rule's), and its value after the step.
struct Scalar {
  std::byte* data = nullptr;
  Format format = Format::float32;
  double value = 0.0;
  PyObject* dict = nullptr;  // not a tensor but a Python int, under `step` in this dict (SparseAdam's)
  bool on_gpu = false;       // where only a kernel reads it
};

// A parameter's gradient, as kernels read it.
struct Gradient {
  pybind11::object original;  // p.grad
  pybind11::object readable;  // the same or, of a DTensor, what this process holds; with its values in memory
  pybind11::object indices;   // of a sparse gradient, whose values are `readable`
};

struct ConstantsBuffer {
  alignas(64) std::byte bytes[kMaxConstantBytes];
};

struct StepWork {
  // Objects that the step works on, held until it ends.
  pybind11::object state;                // optimizer.state
  std::vector<pybind11::dict> groups;    // the parameter groups
  std::vector<pybind11::object> params;  // of all groups
  std::vector<Gradient> gradients;       // of each parameter
  std::vector<pybind11::object> states;  // of each parameter, its dict in optimizer.state; null if it has none
  std::list<pybind11::object> locals;    // of DTensors, what this process holds

  // What is to be done for which parameters, by their numbers.
  std::vector<Job> jobs;  // on the CPU
  std::map<int, std::vector<cuda::DeviceJob>> device_jobs;
  std::vector<FactoredJob> factored_jobs;  // Adafactor's, in place of `jobs`
  cuda::Scaler scaler;
  std::vector<Scalar> scalars;        // to be written after the step
  std::vector<std::size_t> stepped;   // that have a job
  std::vector<std::size_t> missing;   // that lack a state
  std::vector<std::size_t> fallback;  // that torch's code steps
  std::vector<PyObject*> used;        // the objects whose memory jobs and scalars are in

  // What jobs point to.
  std::list<Layout> layouts;
  std::list<Rows> rows;
  std::list<ConstantsBuffer> constants;

  // Python code has run, or may have, since the first address was read: addresses are to be read again.
  bool ran_python = false;
  bool is_reread = false;

  // Makes room for the jobs of so many parameters. Growing vectors would cost a small step a tenth of its time.
  void reserve(std::size_t count);

  // Forgets the jobs and what belongs to them, to read parameters again.
  void restart();

  std::int64_t bytes() const;
};

}  // namespace onepass
