#include "bindings/plan.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <stdexcept>
#include <unordered_map>

#include "bindings/cuda.h"
#include "bindings/names.h"
#include "bindings/ownership.h"
#include "bindings/torch.h"

namespace py = pybind11;

namespace onepass {
namespace {

Stats the_stats;

// After this many readings of the parameters, the optimizer is assumed to be changed by other threads without end.
constexpr int kMaxReadings = 8;

// Returns the result of a complete step without followers.
py::object complete_result() {
  static PyObject* const kComplete = [] {
    StepResult result;
    result.stepped = true;
    return result.to_python().release().ptr();
  }();
  return py::reinterpret_borrow<py::object>(kComplete);
}

std::int64_t measured_bytes(const StepWork& work) {
  std::int64_t bytes = 0;
  for (const Job& job : work.measured) bytes += job.bytes();
  return bytes;
}

// Measures the gradients of a step, and returns the measure of each.
std::vector<double> measure(StepWork& work, const NormRequest& request, int threads) {
  std::vector<double> found;
  run_without_python(measured_bytes(work), work.used, [&] {
    work.coalesce_rows();
    found = measure_gradients(request.measure, work.measured, threads);
  });
  return found;
}

}  // namespace

Stats& stats() { return the_stats; }

Plan::Plan(const std::string& rule, std::size_t first_param)
    : driver_(make_rule_driver(rule)), first_param_(first_param), names_(driver_->info()), groups_(driver_->info()) {}

ParamReader Plan::reader(const StepRequest& request, StepWork& work) {
  return {names_, *driver_, groups_, request, label_, first_param_, work};
}

// -- reading ---------------------------------------------------------------------------------------------------------

void Plan::read_groups(const py::object& optimizer, StepWork& work) {
  label_ = type_name(optimizer.ptr());
  work.state = attribute(optimizer.ptr(), names().state);
  const py::object listed = attribute(optimizer.ptr(), names().param_groups);
  if (!PyDict_Check(work.state.ptr())) throw py::type_error(label_ + ": state must be a dict");
  if (!PyList_Check(listed.ptr())) throw py::type_error(label_ + ": param_groups must be a list");
  for (const py::handle& group : py::reinterpret_borrow<py::list>(listed)) {
    if (!PyDict_Check(group.ptr())) throw py::type_error(label_ + ": a parameter group must be a dict");
    work.groups.push_back(py::reinterpret_borrow<py::dict>(group));
  }
  if (groups_.resize(work.groups.size())) params_.clear();

  std::vector<py::object> lists;
  lists.reserve(work.groups.size());
  for (std::size_t g = 0; g < work.groups.size(); ++g) lists.push_back(groups_.read(g, work.groups[g], label_));

  work.params.reserve(params_.size());
  for (std::size_t g = 0; g < lists.size(); ++g) {
    const auto size = static_cast<std::size_t>(PySequence_Fast_GET_SIZE(lists[g].ptr()));
    for (std::size_t i = 0; i < size; ++i) {
      PyObject* const object = PySequence_Fast_GET_ITEM(lists[g].ptr(), static_cast<Py_ssize_t>(i));
      const std::size_t number = work.params.size();
      work.params.push_back(py::reinterpret_borrow<py::object>(object));
      if (params_.size() == number) params_.emplace_back();
      Param& param = params_[number];
      if (param.object == object && param.group == &groups_[g] && param.index == i) continue;
      param = Param{};
      param.object = object;
      param.group = &groups_[g];
      param.index = i;
      states_moved_ = memory_moved_ = true;
    }
  }
  if (params_.size() != work.params.size()) {
    params_.resize(work.params.size());
    states_moved_ = memory_moved_ = true;
  }
}

void Plan::read_gradients(const StepRequest& request, StepWork& work) {
  work.gradients.resize(params_.size());
  ParamReader params = reader(request, work);
  for (std::size_t k = 0; k < params_.size(); ++k) {
    params.resolve_gradient(params_[k], k);
    if (params_[k].group->master != Master::low_bits) continue;
    work.versions.resize(params_.size(), -1);
    work.versions[k] = version_of(work.params[k].ptr());
    forget_version_with(work.params[k].ptr());
  }
}

// Finds the state dict of each parameter. Hashing a tensor runs Python code, so optimizer.state is walked instead, and
// compared with the last walk.
void Plan::match_states(StepWork& work) {
  PyObject* const state = work.state.ptr();
  Py_ssize_t position = 0;
  PyObject* key = nullptr;
  PyObject* value = nullptr;
  if (!states_moved_) {
    auto item = states_.begin();
    bool same = true;
    while (same && PyDict_Next(state, &position, &key, &value) != 0) {
      same = item != states_.end() && item->first == key && item->second == value;
      if (same) ++item;
    }
    states_moved_ = !same || item != states_.end();
  }
  if (states_moved_) {
    states_.clear();
    std::unordered_map<PyObject*, PyObject*> found;
    position = 0;
    while (PyDict_Next(state, &position, &key, &value) != 0) {
      states_.emplace_back(key, value);
      found.emplace(key, value);
    }
    for (Param& param : params_) {
      const auto at = found.find(param.object);
      PyObject* const own = at == found.end() ? nullptr : at->second;
      if (param.state != nullptr && param.state != own) param.fresh = false;  // replaced or loaded
      param.state = own;
    }
    states_moved_ = false;
  }
  work.states.clear();
  work.states.reserve(params_.size());
  for (const Param& param : params_) work.states.push_back(py::reinterpret_borrow<py::object>(param.state));
}

void Plan::read_params(const StepRequest& request, StepWork& work) {
  ParamReader reader = this->reader(request, work);
  for (std::size_t k = 0; k < params_.size(); ++k) {
    switch (reader.read(params_[k], k, memory_moved_)) {
      case ParamReader::Outcome::no_gradient:
        // Other processes may have a gradient of it. They then communicate to find the norm.
        if (request.norm && !is_plain(work.params[k].ptr()) && py::hasattr(work.params[k], "device_mesh"))
          work.norm_is_partial = true;
        break;
      case ParamReader::Outcome::job:
        work.stepped.push_back(k);
        break;
      case ParamReader::Outcome::missing_state:
        work.missing.push_back(k);
        break;
      case ParamReader::Outcome::fallback:
        work.fallback.push_back(k);
        break;
    }
  }
}

// Finds parameters whose steps would write to the same memory. In one call they would race, so torch's implementation
// steps them one after the other. An overlap within one parameter is an error. Returns true if the findings changed.
bool Plan::find_shared_memory() {
  std::vector<MemoryRange> ranges;
  for (std::size_t k = 0; k < params_.size(); ++k)
    for (std::size_t slot = 0; slot < params_[k].written.size(); ++slot)
      if (const MemoryRange range = params_[k].range(slot, k); !range.empty()) ranges.push_back(range);

  std::vector<char> shared(params_.size());
  std::vector<char> overlaps_itself(params_.size());
  for (const auto& [later, earlier] : find_overlaps(ranges)) {
    if (later == earlier) {
      overlaps_itself[later] = 1;
    } else {
      shared[later] = shared[earlier] = 1;
    }
  }
  bool changed = false;
  for (std::size_t k = 0; k < params_.size(); ++k) {
    Param& param = params_[k];
    changed = changed || param.shared != (shared[k] != 0) || param.overlaps_itself != (overlaps_itself[k] != 0);
    param.shared = shared[k] != 0;
    param.overlaps_itself = overlaps_itself[k] != 0;
  }
  return changed;
}

// Reads states and parameters, and reads them again if Python code had to run or memory turned out to be shared. The
// findings are remembered, so the second reading is the last, unless other threads change the optimizer.
void Plan::read_until_stable(const StepRequest& request, StepWork& work) {
  for (int reading = 0; reading < kMaxReadings; ++reading) {
    match_states(work);
    read_params(request, work);
    const bool found_shared = memory_moved_ && find_shared_memory();
    memory_moved_ = false;  // not before: find_shared_memory takes memory
    if (!found_shared && !work.ran_python) return;
    work.restart();
  }
  throw std::runtime_error(label_ + ": the optimizer was changed while step() was reading it");
}

void Plan::read(const py::object& optimizer, const StepRequest& request, StepWork& work) {
  read_groups(optimizer, work);
  work.reserve(params_.size());
  read_gradients(request, work);
  read_until_stable(request, work);
}

// -- the step --------------------------------------------------------------------------------------------------------

py::object Plan::step(const py::object& optimizer, const StepRequest& request) {
  const StepLock lock(mutex_);
  py::list written, created;  // made here, because it may start the garbage collection, which runs Python code
  StepWork work;
  read(optimizer, request, work);
  if (request.has_scaler() && !take_scaler(request, work)) return StepResult().to_python();
  if (!work.fallback.empty() && !request.fallback_stepped) return fallback_result(work, request);
  std::optional<Owned> owned;
  std::optional<Clipping> clipping;
  py::object device_clipping = py::none();
  if (request.norm && stays_on_gpu(work, request)) {
    owned.emplace(work.used);
    device_clipping = clip_on_gpu(work, request);
  } else if (request.norm) {
    clipping = clip(work, request, owned);
    if (clipping->skips) {
      StepResult skipped;
      skipped.clipping = clipping;
      return skipped.to_python();
    }
  }
  try {
    if (!work.missing.empty()) {
      const std::vector<std::size_t> stepped_by_torch = work.fallback;
      create_states(optimizer, request, work, created);
      work.restart();
      read_until_stable(request, work);
      if (!work.missing.empty())
        throw std::runtime_error(label_ + ": states that _create_states has created are missing from optimizer.state");
      // Whether kernels can step a parameter may depend on the formats of its new states.
      std::vector<std::size_t> new_fallback = work.fallback;
      std::erase_if(new_fallback,
                    [&](std::size_t k) { return std::ranges::find(stepped_by_torch, k) != stepped_by_torch.end(); });
      if (!new_fallback.empty()) {
        work.fallback = std::move(new_fallback);
        discard_states_of_fallbacks(optimizer, work, created);
        return fallback_result(work, request);
      }
    }
    if (!work.changed.empty()) zero_low_bits(request, work);
    if (clipping) work.scale_gradients(clipping->coefficient);
    list_written(work, request, written);
    for (const std::size_t k : work.fallback) the_stats.torch.try_emplace(params_[k].reason);
    driver_->run(work, request.threads);
  } catch (...) {  // nothing has been written
    if (!created.empty()) optimizer.attr("_discard_states")(created);
    throw;
  }
  note_written(work, written);
  for (const std::size_t k : work.fallback) the_stats.torch[params_[k].reason] += 1;
  if (request.followers.empty() && !request.zeroes_grads && !request.norm) return complete_result();
  StepResult result;
  result.stepped = true;
  result.clipping = clipping;
  result.device_clipping = std::move(device_clipping);
  for (std::size_t f = 0; f < request.followers.size(); ++f) result.unfollowed.append(unfollowed(work, f));
  if (request.zeroes_grads) result.unzeroed = unzeroed(work);
  return result.to_python();
}

// Zeroes the low bits of the parameters that were changed since these were valid: each is its new master. Then reads
// all parameters once more. Not earlier, because a step that is skipped, or fails, changes no state.
void Plan::zero_low_bits(const StepRequest& request, StepWork& work) {
  for (const std::size_t k : work.changed) {
    py::handle(lookup(params_[k].state, names().master_low)).attr("zero_")();
    remember_version(work.params[k].ptr(), work.versions[k]);
  }
  work.restart();
  read_until_stable(request, work);
  if (!work.missing.empty())
    throw std::runtime_error(label_ + ": the optimizer was changed while step() was reading it");
}

// Discards the states that were created for parameters that torch's implementation steps: it would read them, although
// some are not initialized.
void Plan::discard_states_of_fallbacks(const py::object& optimizer, const StepWork& work, const py::list& created) {
  py::list unused;
  for (const py::handle& item : created) {
    const PyObject* const param = PyTuple_GET_ITEM(item.ptr(), 0);
    if (std::ranges::any_of(work.fallback, [&](std::size_t k) { return work.params[k].ptr() == param; }))
      unused.append(item);
  }
  optimizer.attr("_discard_states")(unused);
  states_moved_ = true;
}

// Returns the result that names the parameters that torch's implementation has to step first.
py::object Plan::fallback_result(StepWork& work, const StepRequest& request) const {
  StepResult result;
  result.fallback = named(work.fallback);
  if (request.norm) result.measures = measures(work, request);
  return result.to_python();
}

// Measures the gradients that kernels read. Returns a list with a number for each parameter, or None.
py::list Plan::measures(StepWork& work, const StepRequest& request) const {
  const std::vector<double> found = measure(work, *request.norm, request.threads);
  py::list all(params_.size());
  for (std::size_t k = 0; k < params_.size(); ++k) all[k] = py::none();
  for (std::size_t j = 0; j < found.size(); ++j) all[work.measured_params[j]] = py::float_(found[j]);
  return all;
}

// Measures the norm of all gradients, and returns how they are to be clipped. Other Python code may run meanwhile: the
// user's functions, or other threads. If so, takes references that have to be held until the step is done.
Clipping Plan::clip(StepWork& work, const StepRequest& request, std::optional<Owned>& owned) const {
  const NormRequest& norm = *request.norm;
  if (work.is_measured_on_gpu()) {
    owned.emplace(work.used);
    return clipping_for(norm, norm_of(decide(work, request)));
  }
  const bool partial = work.norm_is_partial || !work.measured_on_gpu.empty();
  if (partial || !norm.policy.is_none() || lets_others_run(measured_bytes(work), work.used.size()))
    owned.emplace(work.used);
  const double found = partial ? norm.norm_of(measures(work, request)).cast<double>()
                               : norm_of(norm.measure, combine(norm.measure, measure(work, norm, request.threads)));
  return clipping_for(norm, std::fabs(request.grad_factor) * found);
}

// Measures the gradients of a step on their GPU.
DecidedClipping Plan::decide(const StepWork& work, const StepRequest& request) {
  const auto& [device, gradients] = *work.measured_on_gpu.begin();
  const NormRequest& norm = *request.norm;
  return decide_on_cuda(device, norm.measure, gradients, norm.limits, request.grad_factor, work.inputs);
}

// Has the norm, the coefficient and whether the step is skipped found on the GPU, where the step reads them. Returns
// the tensor that holds them.
py::object Plan::clip_on_gpu(StepWork& work, const StepRequest& request) {
  DecidedClipping clipping = decide(work, request);
  work.inputs.clipping = clipping.data;
  return std::move(clipping.tensor);
}

// Whether a GPU may decide that a step is skipped: the host keeps no step count, follower or flag of a first step that
// would be wrong then.
bool Plan::may_skip_on_gpu(const StepWork& work, const StepRequest& request) const {
  if (!work.jobs.empty() || !work.fallback.empty() || !work.scalars.empty() || work.device_jobs.size() > 1)
    return false;
  // Not the first step: if it is skipped, no states may have been created, and the next step is the first.
  if (!work.missing.empty() || !request.followers.empty()) return false;
  return driver_->info().counts_steps || std::ranges::none_of(params_, &Param::fresh);
}

// Whether only the GPU needs the norm, the coefficient and whether the step is skipped.
bool Plan::stays_on_gpu(const StepWork& work, const StepRequest& request) const {
  return work.is_measured_on_gpu() && request.norm->policy.is_none() &&
         (!request.norm->limits.skips_nonfinite || may_skip_on_gpu(work, request));
}

// Fills the list that `_discard_states` takes.
void Plan::create_states(const py::object& optimizer, const StepRequest& request, StepWork& work,
                         const py::list& created) {
  py::list scalar_names;
  for (const py::str& name : names_.scalars) scalar_names.append(name);
  py::list wanted;
  std::vector<Param*> fresh;  // without those that lack only followers
  for (const std::size_t k : work.missing) {
    Param& param = params_[k];
    py::list state_names;
    for (std::size_t s = 0; s < names_.states.size(); ++s) {
      if ((param.states_used >> s & 1) == 0) continue;
      state_names.append(names_.states[s]);
      PyObject* const state = param.state == nullptr ? nullptr : lookup(param.state, names_.states[s]);
      if (state == nullptr || state == Py_None) fresh.push_back(&param);
    }
    if (param.master != Master::none) state_names.append(master_name(param.master));
    if (param.rounds && !driver_->info().counts_steps) state_names.append(names().step);
    py::list follower_names;
    for (const FollowerRequest& follower : request.followers)
      if (follower.is_state()) follower_names.append(follower.state_name);
    wanted.append(py::make_tuple(work.groups[param.group->index], work.params[k], work.gradients[k].original,
                                 state_names, follower_names));
  }
  optimizer.attr("_create_states")(wanted, scalar_names, created);
  for (Param* param : fresh) param->fresh = true;
  states_moved_ = true;
}

// Passes GradScaler's values to the kernels. Returns false if not all of this step is made and counted on their GPU.
bool Plan::take_scaler(const StepRequest& request, StepWork& work) {
  if (!may_skip_on_gpu(work, request) || (request.norm && !stays_on_gpu(work, request))) return false;

  TensorView scale;
  TensorView found;
  const auto read = [](const py::object& tensor, TensorView& view) {
    return tensor.is_none() || (torch().dlpack.view(tensor.ptr(), view) && view.format == Format::float32);
  };
  if (!read(request.grad_scale, scale) || !read(request.found_inf, found)) return false;
  if (!work.device_jobs.empty()) {
    const auto elsewhere = [device = work.device_jobs.begin()->first](const py::object& tensor,
                                                                      const TensorView& view) {
      return !tensor.is_none() && view.cuda != device;
    };
    if (elsewhere(request.grad_scale, scale) || elsewhere(request.found_inf, found)) return false;
  }
  work.inputs = {.grad_scale = scale.data, .found_inf = found.data};
  return true;
}

// Lists the tensors of the user that the step is going to write. It runs no Python code, and comes before the step,
// because memory may run out.
void Plan::list_written(const StepWork& work, const StepRequest& request, py::list& written) const {
  for (const std::size_t k : work.stepped) {
    written.append(work.params[k]);
    for (std::size_t f = 0; f < request.followers.size(); ++f) {
      const FollowerRequest& follower = request.followers[f];
      if (follower.is_state() || (params_[k].followed >> f & 1) == 0) continue;
      const py::int_ key(reinterpret_cast<std::uintptr_t>(work.params[k].ptr()));
      written.append(follower.tensors[key]);
    }
    if (params_[k].zeroed) written.append(work.gradients[k].original);
  }
}

// Does what follows a step: it writes counts that are no tensors, and increments the versions of what was written.
void Plan::note_written(const StepWork& work, const py::list& written) {
  for (const Scalar& scalar : work.scalars)
    if (scalar.dict != nullptr)
      py::handle(scalar.dict)[names().step] = py::reinterpret_steal<py::object>(PyLong_FromDouble(scalar.value));
  if (work.stepped.empty()) return;
  for (const std::size_t k : work.stepped) params_[k].fresh = false;
  torch().increment_version(written);
  remember_versions(work);
  the_stats.kernel["cpu"] += work.jobs.size();
  the_stats.kernel["cuda"] += work.stepped.size() - work.jobs.size();
}

// Remembers the versions of parameters whose low bits are valid: those that were stepped, and others that were valid
// before. (Views of one tensor share a version, so the step has changed that of parameters without a gradient, too.)
void Plan::remember_versions(const StepWork& work) const {
  if (work.versions.empty()) return;
  const auto remember = [&](std::size_t k) {
    remember_version(work.params[k].ptr(), version_of(work.params[k].ptr()));
  };
  for (std::size_t k = 0; k < params_.size(); ++k)
    if (work.versions[k] >= 0 && known_version(work.params[k].ptr()) == work.versions[k]) remember(k);
  for (const std::size_t k : work.stepped)
    if (params_[k].master == Master::low_bits) remember(k);
}

py::list Plan::named(const std::vector<std::size_t>& numbers) const {
  py::list all;
  for (const std::size_t k : numbers)
    all.append(py::make_tuple(params_[k].group->index, params_[k].index, params_[k].reason));
  return all;
}

py::list Plan::unfollowed(const StepWork& work, std::size_t follower) const {
  py::list all;
  for (std::size_t k = 0; k < params_.size(); ++k)
    if ((params_[k].followed >> follower & 1) == 0) all.append(work.params[k]);
  return all;
}

py::list Plan::unzeroed(const StepWork& work) const {
  py::list all;
  for (std::size_t k = 0; k < params_.size(); ++k)
    if (!params_[k].zeroed && !work.gradients[k].original.is_none()) all.append(work.params[k]);
  return all;
}

// -- questions -------------------------------------------------------------------------------------------------------

std::pair<py::list, py::list> Plan::divide(const py::object& optimizer) {
  const StepLock lock(mutex_);
  StepWork work;
  StepRequest request;
  request.only_reads = true;
  read(optimizer, request, work);
  py::list kernel;
  std::vector<std::size_t> numbers = work.stepped;
  numbers.insert(numbers.end(), work.missing.begin(), work.missing.end());
  std::ranges::sort(numbers);
  for (const std::size_t k : numbers) kernel.append(py::make_tuple(params_[k].group->index, params_[k].index));
  return {kernel, named(work.fallback)};
}

py::list Plan::explain(const py::object& optimizer, StepRequest request) {
  const StepLock lock(mutex_);
  request.only_reads = true;
  StepWork work;
  read_groups(optimizer, work);
  read_gradients(request, work);
  py::list rows;
  // Read twice: the first reading notes all memory, and so finds what is shared.
  for (const bool first : {true, false}) {
    work.restart();
    match_states(work);
    ParamReader reader = this->reader(request, work);
    for (std::size_t k = 0; k < params_.size(); ++k) {
      Param& param = params_[k];
      std::string path = "kernel";
      std::string reason;
      try {
        switch (reader.read(param, k, memory_moved_)) {
          case ParamReader::Outcome::no_gradient:
            reason = reader.unsupported_reason(param, k);
            if (!reason.empty()) path = "torch";
            reason += reason.empty() ? "no gradient now" : "; no gradient now";
            break;
          case ParamReader::Outcome::fallback:
            path = "torch";
            reason = param.reason;
            break;
          case ParamReader::Outcome::job:
          case ParamReader::Outcome::missing_state:
            if (const int device = reader.last_device(); device >= 0) reason = "cuda:" + std::to_string(device);
            break;
        }
      } catch (const py::builtin_exception& error) {  // value_error or ZeroDivision
        path = "error";
        reason = error.what();
      }
      if (!first) rows.append(py::make_tuple(param.group->index, param.index, path, reason));
    }
    if (first) find_shared_memory();
  }
  memory_moved_ = true;
  return rows;
}

// -- the module's names ----------------------------------------------------------------------------------------------

namespace {

StepRequest make_request(double grad_factor, int threads, std::vector<FollowerRequest> followers,
                         std::optional<NormRequest> norm, double clip_value, bool zeroes_grads, bool fallback_stepped,
                         py::object grad_scale, py::object found_inf) {
  if (followers.size() > kMaxFollowers)
    throw py::value_error("followers must be at most " + std::to_string(kMaxFollowers) + ", got " +
                          std::to_string(followers.size()));
  return {.grad_factor = grad_factor,
          .threads = threads,
          .followers = std::move(followers),
          .norm = std::move(norm),
          .clip_value = clip_value,
          .zeroes_grads = zeroes_grads,
          .fallback_stepped = fallback_stepped,
          .grad_scale = std::move(grad_scale),
          .found_inf = std::move(found_inf)};
}

// A plan holds values of the groups. They may refer to the optimizer, which holds the plan.
void let_garbage_collector_see(PyHeapTypeObject* heap_type) {
  PyTypeObject* const type = &heap_type->ht_type;
  type->tp_flags |= Py_TPFLAGS_HAVE_GC;
  type->tp_traverse = [](PyObject* self, visitproc visit, void* arg) {
    Py_VISIT(Py_TYPE(self));
    if (!py::detail::is_holder_constructed(self)) return 0;
    return py::cast<const Plan&>(py::handle(self)).traverse(visit, arg);
  };
  type->tp_clear = [](PyObject* self) {
    if (py::detail::is_holder_constructed(self)) py::cast<Plan&>(py::handle(self)).clear();
    return 0;
  };
}

}  // namespace

void define_plan(py::module_& m) {
  m.attr("MAX_FOLLOWERS") = kMaxFollowers;  // of one request
  m.attr("SKIPPED_BY_SCALER") = cuda::kSkippedByScaler;
  py::class_<FollowerRequest>(m, "Follower",
                              "A tensor of every parameter that a step updates from the new parameter: f += weight * "
                              "(p - f) and then, with `sets_param`, p = f. Without a weight it is not changed. It is "
                              "the state `state_name` or, with `tensors`, the user's: a dict from id(p) to f.")
      .def(py::init([](const std::string& what, py::str state_name, std::optional<double> weight, bool sets_param,
                       std::optional<py::dict> tensors) {
             std::string label = "its " + what + " (" + std::string(state_name) + ")";
             return FollowerRequest{std::move(label), std::move(state_name),
                                    tensors ? py::object(*tensors) : py::object(py::none()), weight, sets_param};
           }),
           py::arg("what"), py::arg("state_name"), py::arg("weight"), py::arg("sets_param"),
           py::arg("tensors") = std::nullopt);

  py::class_<NormRequest>(m, "NormRequest", "What a step measures before the update, and how it depends on it.")
      .def(py::init([](bool largest, double max_norm, bool skip_nonfinite, py::object policy, py::object norm_of) {
             return NormRequest{largest ? Measure::largest_magnitude : Measure::sum_of_squares,
                                {.max_norm = max_norm, .skips_nonfinite = skip_nonfinite},
                                std::move(policy),
                                std::move(norm_of)};
           }),
           py::arg("largest"), py::arg("max_norm"), py::arg("skip_nonfinite"), py::arg("policy"), py::arg("norm_of"))
      .def(
          "clipping",
          [](const NormRequest& self, double norm) {
            const Clipping clipping = clipping_for(self, norm);
            return std::pair(clipping.coefficient, clipping.skips);
          },
          py::arg("norm"), "Return the coefficient of the gradients, and whether the step is skipped.");

  py::class_<StepRequest>(m, "StepRequest", "The arguments of a step. A request may be used for several steps.")
      .def(py::init(&make_request), py::arg("grad_factor"), py::arg("threads"),
           py::arg("followers") = std::vector<FollowerRequest>(), py::arg("norm") = std::nullopt,
           py::arg("clip_value") = kNoLimit, py::arg("zeroes_grads") = false, py::arg("fallback_stepped") = false,
           py::arg("grad_scale") = py::none(), py::arg("found_inf") = py::none());

  m.attr("master_versions") = master_versions();
  m.def(
      "remember_version",
      [](const py::object& param, std::int64_t version) {
        forget_version_with(param.ptr());
        remember_version(param.ptr(), version);
      },
      py::arg("param"), py::arg("version"), "Set the version at which the low bits of a parameter's master are valid.");
  m.attr("StepResult") = py::reinterpret_borrow<py::object>(reinterpret_cast<PyObject*>(step_result_type()));

  py::class_<Plan>(m, "Plan", "The steps of one optimizer: reads its Python objects and runs the kernels.",
                   py::custom_type_setup(&let_garbage_collector_see))
      .def(py::init<const std::string&, std::size_t>(), py::arg("rule"), py::arg("first_param") = 0)
      .def("step", &Plan::step, py::arg("optimizer"), py::arg("request"),
           "Step all parameters and return a StepResult. Nothing is done if torch's implementation has to step some of "
           "them first, or if GradScaler's values cannot stay on their GPU.")
      .def(
          "divide", &Plan::divide, py::arg("optimizer"),
          "Return (group, index) of the parameters with gradients that kernels can step, and (group, index, reason) of "
          "the others. Raises the errors of `step`.")
      .def("explain", &Plan::explain, py::arg("optimizer"), py::arg("request"),
           "Return (group, index, path, reason) of every parameter.");
}

}  // namespace onepass
