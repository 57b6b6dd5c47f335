// One step: its request, its work and its result.
#pragma once

#include <pybind11/pybind11.h>

#include <array>
#include <cstddef>
#include <list>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "bindings/dlpack.h"
#include "cpu/factored.h"
#include "cpu/measure.h"
#include "cpu/rows.h"
#include "cuda/step.h"
#include "job.h"
#include "norm.h"
#include "rules/table.h"

namespace onepass {

// -- request and result ----------------------------------------------------------------------------------------------

// A follower of every parameter: a tensor that is updated from the new parameter, f += weight * (p - f). It is a state
// of the parameter, which is created if it is missing, or one of the user's tensors. A user's tensor that kernels
// cannot write is left to the caller.
struct FollowerRequest {
  std::string label;             // for messages
  pybind11::str state_name;      // of a state
  pybind11::object tensors;      // the user's tensors: a dict from id(parameter) to tensor; None for a state
  std::optional<double> weight;  // none: it is not changed in this step
  bool sets_param = false;       // p = f afterwards

  bool is_state() const { return tensors.is_none(); }
};

// What a step measures before the update: the norm of all gradients. The step depends on it.
struct NormRequest {
  Measure measure = Measure::sum_of_squares;  // the 2-norm, or the largest magnitude
  NormLimits limits;
  // A function of a finite norm that returns the coefficient of the gradients, in place of max_norm; zero skips the
  // step. May be None.
  pybind11::object policy;
  // A function that returns the norm if kernels cannot measure all gradients, or not as a whole (DTensors). Its
  // argument is a list with the measure of each parameter's gradient, None where kernels have not measured it.
  pybind11::object norm_of;
};

Clipping clipping_for(const NormRequest& request, double norm);

struct StepRequest {
  double grad_factor = 1.0;  // factor of gradients
  int threads = 1;
  std::vector<FollowerRequest> followers;
  std::optional<NormRequest> norm;
  double clip_value = kNoLimit;   // scaled gradients are clamped to [-clip_value, clip_value]
  bool zeroes_grads = false;      // gradients are overwritten with zeros
  bool only_reads = false;        // nothing is stepped or changed
  bool fallback_stepped = false;  // torch's implementation has stepped the parameters of the last result's `fallback`
  // GradScaler's two values in a GPU's memory (each a tensor or None), for steps that are made and counted on that GPU.
  pybind11::object grad_scale = pybind11::none();
  pybind11::object found_inf = pybind11::none();

  bool has_scaler() const { return !grad_scale.is_none() || !found_inf.is_none(); }
};

// In Python a struct sequence, because reading its fields takes a tenth of the time of reading a property.
struct StepResult {
  bool stepped = false;       // false: nothing was done
  pybind11::list fallback;    // (group, index, reason) of parameters that torch's implementation has to step first
  pybind11::list unfollowed;  // for each follower, the parameters for which this step has not updated it
  pybind11::list unzeroed;    // parameters whose gradients should be zeroed, but were not
  pybind11::object measures = pybind11::none();  // with a fallback: the argument of `norm_of`
  std::optional<Clipping> clipping;
  pybind11::object device_clipping = pybind11::none();  // in its place, if only the GPU has it: a tensor of its bytes

  pybind11::object to_python() const;
};

PyTypeObject* step_result_type();

// -- work ------------------------------------------------------------------------------------------------------------

using RuleScalars = std::array<double, kMaxScalars>;

// A scalar of one parameter (`step` or one of the rule's), and its value after the step.
struct Scalar {
  std::byte* data = nullptr;
  Format format = Format::float32;
  double value = 0.0;
  const double* late = nullptr;  // not null: the value is here once the kernels have run
  PyObject* dict = nullptr;      // not null: the scalar is a Python int, `step` in this dict (SparseAdam)
  bool on_gpu = false;           // only a kernel reads and writes it
};

// A parameter's gradient, as kernels read it.
struct Gradient {
  pybind11::object original;  // p.grad
  pybind11::object readable;  // p.grad or its local part, without lazy negation; of a sparse gradient, its values
  pybind11::object indices;   // of a sparse gradient
  bool is_copy = false;       // `readable` has memory of its own
};

// Returns a job that has only a gradient, for the measure phase and for clipping in place. `packed`: its elements are
// known to be consecutive in memory. Otherwise its layout is added to `layouts` if they are not.
Job gradient_job(const TensorView& gradient, bool wide, bool packed, std::list<Layout>& layouts);

// Everything that one step works on. Made for the step, and destroyed after it.
struct StepWork {
  // References to the objects that the step works on.
  pybind11::object state;                // optimizer.state
  std::vector<pybind11::dict> groups;    // the parameter groups
  std::vector<pybind11::object> params;  // of all groups
  std::vector<Gradient> gradients;       // of each parameter
  std::vector<std::int64_t> versions;    // of each parameter; -1: not known; empty if no master is split
  std::vector<pybind11::object> states;  // of each parameter, its dict in optimizer.state; null if it has none
  std::list<pybind11::object> locals;    // the local parts of DTensors

  // Jobs, and lists of parameters by their numbers.
  std::vector<Job> jobs;  // on the CPU
  std::map<int, std::vector<cuda::DeviceJob>> device_jobs;
  std::vector<FactoredJob> factored_jobs;  // Adafactor's and CAME's, in place of `jobs`
  cuda::Inputs inputs;
  std::vector<Scalar> scalars;       // written after the step
  std::vector<std::size_t> stepped;  // parameters with a job
  // Those with sums over shards (Job::whole), in the order of their jobs, on the CPU (-1) and on each GPU.
  std::map<int, std::vector<std::size_t>> summed_shards;
  std::vector<std::size_t> missing;   // parameters that lack a state
  std::vector<std::size_t> fallback;  // parameters that torch's implementation steps
  std::vector<std::size_t> changed;   // parameters that were changed since the low bits of their masters were valid
  std::vector<PyObject*> used;        // the objects whose memory jobs, measures and scalars use

  // The gradients that kernels measure: jobs that have only a gradient. On the CPU also the numbers of their
  // parameters.
  std::vector<Job> measured;
  std::vector<std::size_t> measured_params;
  std::map<int, std::vector<Job>> measured_on_gpu;
  bool norm_is_partial = false;  // the norm does not follow from these measures alone

  // What jobs point to.
  std::list<Layout> layouts;
  std::list<Rows> rows;
  std::list<ConstantsBuffer> constants;
  std::list<RuleScalars> late_scalars;

  // Python code has or may have run since the first address was read, so addresses have to be read again.
  bool ran_python = false;
  bool is_reread = false;

  bool rows_are_coalesced = false;

  // Reserves memory for the jobs of this many parameters. Growing vectors would cost a small step a tenth of its time.
  void reserve(std::size_t count);

  // Clears the jobs and what belongs to them, so that parameters can be read again.
  void restart();

  // Coalesces the rows of sparse gradients, unless that has been done, and sets the lengths of their jobs.
  void coalesce_rows();

  // Returns the DTensors with sums over shards on a device.
  pybind11::list summed_shards_on(int device) const;

  std::int64_t bytes() const;

  void scale_gradients(double factor);

  // Whether all gradients are on one GPU, and kernels measure them as a whole.
  bool is_measured_on_gpu() const {
    return !norm_is_partial && measured.empty() && fallback.empty() && measured_on_gpu.size() == 1;
  }
};

}  // namespace onepass
