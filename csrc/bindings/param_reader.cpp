#include "bindings/param_reader.h"

#include "bindings/cuda.h"
#include "bindings/errors.h"
#include "bindings/names.h"
#include "bindings/reading.h"
#include "bindings/torch.h"
#include "cpu/fpmode.h"
#include "formats/stochastic.h"
#include "layout.h"

namespace py = pybind11;

namespace onepass {

RuleNames::RuleNames(const RuleInfo& info) {
  for (const std::string name : info.state_names) {
    states.push_back(interned(name));
    scales.push_back(interned(name + "_scale"));
    state_labels.push_back("its state " + name);
  }
  if (info.counts_steps) scalars.push_back(onepass::names().step);
  for (const char* name : info.scalar_names) scalars.push_back(interned(name));
}

MemoryRange Param::range(std::size_t slot, std::size_t owner) const {
  MemoryRange range{.first = written[slot].first, .past = written[slot].second, .owner = owner};
  for (const auto& [at, spacing] : spacings)
    if (at == slot) range.spacing = &spacing;
  return range;
}

ParamReader::ParamReader(const RuleNames& names, const RuleDriver& driver, GroupReader& groups,
                         const StepRequest& request, const std::string& label, std::size_t first_param, StepWork& work)
    : names_(names),
      driver_(driver),
      info_(driver.info()),
      groups_(groups),
      request_(request),
      label_(label),
      first_param_(first_param),
      work_(work) {}

// Returns which parameter it is, for messages.
std::string ParamReader::label_of(const Param& param) const {
  const std::size_t group = param.group->index;
  std::string message = label_ + ": parameter " + std::to_string(param.index) + " of group " + std::to_string(group);
  if (PyObject* listed = lookup(work_.groups[group].ptr(), onepass::names().param_names); listed != nullptr) {
    const py::list known(py::reinterpret_borrow<py::object>(listed));
    if (param.index < known.size()) message += " '" + std::string(py::str(known[param.index])) + "'";
  }
  return message + " (shape " + shape_text(param.object) + ", " + text_of(param.object, "dtype") + ")";
}

void ParamReader::fail(const Param& param, const std::string& what) const {
  throw py::value_error(label_of(param) + ": " + what);
}

// -- the parameter ---------------------------------------------------------------------------------------------------

std::string ParamReader::unsupported_reason(Param& param, std::size_t number) {
  Reading r{
      .param = param, .number = number, .object = work_.params[number].ptr(), .gradient = work_.gradients[number]};
  return unsupported_reason(r);
}

std::string ParamReader::unsupported_reason(Reading& r) const {
  const bool plain = is_plain(r.object);
  const bool sharded = !plain && is_dtensor(r.object) && driver_.takes_shards();
  r.local = sharded ? work_.locals.emplace_back(local_of(r.object)).ptr() : r.object;
  if (r.param.group->differentiable) return "differentiable=True";
  if (!plain && !sharded) return "tensor subclass " + type_name(r.object);
  if (!is_plain(r.local)) return "DTensor of a " + type_name(r.local);
  TensorView& view = r.own();
  if (!torch().dlpack.view(r.local, view)) {
    return py::handle(r.object).attr("is_meta").cast<bool>() ? "device meta" : "no strided memory";
  }
  if (!view.on_cpu && (view.cuda < 0 || !driver_.runs_on_cuda()))
    return "device " + py::str(py::handle(r.object).attr("device").attr("type")).cast<std::string>();
  if (view.cuda >= 0) {
    if (!is_cuda_known(view.cuda)) work_.ran_python = true;
    if (const std::string why = cuda_refusal(view.cuda); !why.empty()) return "device cuda: " + why;
  }
  if (!view.format) return "dtype " + text_of(r.object, "dtype");
  if (request_.clip_value != kNoLimit && !driver_.takes_followers()) return "clip_value";
  return driver_.unsupported_reason(view);
}

bool ParamReader::read_own(Reading& r) {
  Param& param = r.param;
  const TensorView& own = r.own();
  Job& job = r.job();
  job.operands[kParam] = {own.data, *own.format};
  job.wide = *own.format == Format::float64;
  job.grad_factor = request_.grad_factor * param.group->sign;
  job.length = elements_of(own);
  job.blocks = {};
  job.rounding = {};
  if (r.is_shard()) {
    param.spread.read(r.object);
    if (param.group->takes_sums) job.whole = param.spread.elements(r.object, work_.ran_python) * (own.complex ? 2 : 1);
  }
  param.master = job.master = Master::none;
  if (size_of(*own.format) == 2 && !own.complex && driver_.takes_followers()) {
    if (param.group->master == Master::low_bits && *own.format != Format::bfloat16)
      fail(param, "master=\"split\" needs a bfloat16 parameter; use master=\"float32\"");
    param.master = job.master = param.group->master;
  }
  if (own.complex && !param.complex) {  // its gradient may be lazily conjugated
    param.complex = work_.ran_python = true;
    resolve_gradient(param, r.number);
  }
  if (is_lazy_now(r, kParam, r.local)) return r.fall_back("negated or conjugated parameter");

  // Whether the parameter is packed is remembered with the shape and strides that it was found for.
  const auto ndim = static_cast<std::size_t>(own.ndim);
  r.packed = param.packed.size() == 2 * ndim && same_numbers(param.packed.data(), own.shape, own.ndim) &&
             same_numbers(param.packed.data() + ndim, own.strides, own.ndim);
  if (r.packed) return true;
  param.packed.clear();
  const Overlap overlap = self_overlap(shape_of(own), strides_of(own));
  if (overlap == Overlap::certain) fail(param, "several of its elements share the same memory (it is expanded)");
  if (overlap == Overlap::possible) return r.fall_back("parameter with interleaved strides");
  r.packed = is_flat(make_layout(shape_of(own), {strides_of(own)}));
  if (r.packed) {
    param.packed.assign(own.shape, own.shape + own.ndim);
    param.packed.insert(param.packed.end(), own.strides, own.strides + own.ndim);
  }
  return true;
}

// Whether this process holds the same part of a gradient or state as of its parameter. Another shape of the whole
// tensor is an error in every process, also where the local parts happen to have the same shape.
bool ParamReader::is_spread_as_param(Reading& r, std::size_t operand, PyObject* tensor, const std::string& what) {
  switch (r.param.spread.compare(operand, tensor, r.object, work_.ran_python)) {
    case Spread::Match::same:
      return true;
    case Spread::Match::other_shape:
      fail(r.param, what + " has shape " + shape_text(tensor));
    case Spread::Match::other_mesh:
      fail(r.param, what + " is spread over another mesh");
    case Spread::Match::other_placements:
      return false;
  }
  return false;
}

// Whether torch negates or conjugates the tensor lazily. torch is asked again if the object or its address has changed
// and, for a complex tensor, at each step, because z.conj() has the address of z.
bool ParamReader::is_lazy_now(Reading& r, std::size_t operand, PyObject* tensor) {
  TensorView& view = r.views[operand];
  Param::Laziness& known = r.param.laziness[operand];
  const bool same = known.tensor == tensor && known.data == view.data;
  if (same && (work_.is_reread || (!known.lazy && !view.complex))) return known.lazy;
  work_.ran_python = true;
  known = {tensor, view.data, is_lazy(tensor, view.complex)};
  torch().dlpack.view(tensor, view);  // again, because Python code may have run
  return known.lazy;
}

// Sets an operand of the job. Throws if its device or shape do not fit the parameter.
void ParamReader::set_operand(Reading& r, std::size_t operand, PyObject* tensor, const std::string& what) {
  const TensorView& view = r.views[operand];
  if (!same_device(view, r.own()))
    fail(r.param, what + " is on device " + text_of(tensor, "device") + ", not on the parameter's");
  if (!driver_.state_shape_matches(operand, view, r.own()))
    fail(r.param, what + " has shape " + shape_text(tensor) + " and dtype " + text_of(tensor, "dtype"));
  r.job().operands[operand] = {view.data, *view.format};
}

// -- memory ----------------------------------------------------------------------------------------------------------

// Notes all memory that this step writes for the parameter. If it has changed, overlaps are searched for again.
void ParamReader::note_memory(Reading& r, bool& memory_moved) {
  const auto note_move = [&] {
    memory_moved = true;
    r.param.shared = r.param.overlaps_itself = false;  // find_shared_memory finds them again
  };
  const auto note = [&](std::size_t slot, std::byte* first, std::int64_t bytes) {
    auto& known = r.param.written[slot];
    const std::pair range{first, first + bytes};
    if (known == range) return;
    known = range;
    note_move();
  };
  std::vector<std::pair<std::size_t, Spacing>> spacings;
  for (std::size_t k = 0; k < kAllOperands; ++k) {
    const Operand& operand = r.job().operands[k];
    if (operand.data == nullptr || (k == kGrad && !r.job().zeroes_grad)) {
      note(k, nullptr, 0);
      continue;
    }
    const TensorView& view = r.views[k];
    std::int64_t elements = r.job().length;
    if (!r.packed || !r.has_strides_of_param(k) || !same_shape(view, r.own())) {
      elements = extent(shape_of(view), strides_of(view));
      if (elements > elements_of(view))
        spacings.emplace_back(k, spacing_of(shape_of(view), strides_of(view), size_of(operand.format)));
    }
    note(k, operand.data, elements * static_cast<std::int64_t>(size_of(operand.format)));
  }
  if (spacings != r.param.spacings) {
    r.param.spacings = std::move(spacings);
    note_move();
  }
  for (std::size_t n = 0; n < r.scalars.size(); ++n) {
    const Scalar& scalar = r.scalars[n];
    note(kAllOperands + n, scalar.data, scalar.data == nullptr ? 0 : static_cast<std::int64_t>(size_of(scalar.format)));
  }
  for (std::size_t s = 0; s < kMaxStates; ++s)
    note(kAllOperands + r.scalars.size() + s, r.job().blocks.scales[s], r.scale_bytes[s]);
}

void ParamReader::forget_memory(Param& param, bool& memory_moved) {
  if (param.written == decltype(param.written){}) return;
  param.written = {};
  param.spacings.clear();
  memory_moved = true;
}

// Whether the gradient overlaps the parameter or its states. A gradient that is the parameter itself, element by
// element, does not count. Otherwise the result depends on torch's sequence of operations, so torch's implementation
// steps it.
bool ParamReader::gradient_overlaps(const Reading& r) {
  const TensorView& grad = r.views[kGrad];
  const auto size = static_cast<std::int64_t>(size_of(*grad.format));
  const std::byte* const past = grad.data + extent(shape_of(grad), strides_of(grad)) * size;
  const auto overlaps = [&](std::size_t slot) {
    const auto& [written_first, written_past] = r.param.written[slot];
    if (grad.data >= written_past || written_first >= past) return false;
    const Spacing spacing = spacing_of(shape_of(grad), strides_of(grad), size_of(*grad.format));
    return overlap({.first = grad.data, .past = past, .owner = r.number, .spacing = &spacing},
                   r.param.range(slot, r.number));
  };
  for (std::size_t slot = kFirstState; slot < r.param.written.size(); ++slot)
    if (overlaps(slot)) return true;
  const bool same = r.job().rows == nullptr && grad.data == r.own().data && grad.format == r.own().format &&
                    r.has_strides_of_param(kGrad);
  return !same && overlaps(kParam);
}

// -- GPUs ------------------------------------------------------------------------------------------------------------

// Chooses where the constants of the parameter's step are made: on its GPU if a value that they depend on is there, or
// if they depend on sums over the tensor; else on the CPU. For a GPU, the job gets all these values.
bool ParamReader::choose_constants_device(Reading& r) {
  Group& group = *r.param.group;
  const bool counts_there = !names_.scalars.empty() && r.scalars[0].on_gpu;
  for (std::size_t n = 0; n < names_.scalars.size(); ++n)
    if (r.scalars[n].on_gpu != counts_there)
      return r.fall_back("numbers of which some are on the CPU and some on a GPU");
  // Scalars that are advanced on the CPU depend on the hyperparameters.
  const bool needed_here = r.own().cuda != group.device || (!counts_there && !info_.scalar_names.empty());
  if (group.device >= 0 && needed_here) {
    groups_.fetch_from_device(group, work_.groups[group.index]);
    work_.ran_python = true;
  }
  const bool takes_sums = r.own().cuda >= 0 && group.takes_sums;
  if (!counts_there && group.device < 0 && !takes_sums) return true;
  if (takes_sums && !counts_there && info_.sums_set_scalars)
    return r.fall_back("state " + std::string(info_.scalar_names[0]) + " that is not on the GPU");

  cuda::DeviceJob& device_job = r.device_job;
  device_job.hyper = &group.device_hyper;
  device_job.job.takes_sums = takes_sums;
  device_job.numbers[0] = {.value = info_.counts_steps ? r.scalars[0].value : (r.param.fresh ? 0.0 : 1.0)};
  if (counts_there) {
    for (std::size_t n = 0; n < names_.scalars.size(); ++n)
      device_job.numbers[n] = {.data = r.scalars[n].data, .format = r.scalars[n].format};
    return true;
  }
  const RuleScalars own = scalars_of_rule(r);
  for (std::size_t n = 0; n < own.size(); ++n) device_job.numbers[1 + n] = {.value = own[n]};
  return true;
}

// Whether every element has an address that a GPU can read. (All tensors that torch makes do.)
bool ParamReader::is_aligned(Reading& r) {
  if (r.own().on_cpu) return true;
  for (const Operand& operand : r.job().operands)
    if (reinterpret_cast<std::uintptr_t>(operand.data) % size_of(operand.format) != 0)
      return r.fall_back("memory that is not aligned to its elements");
  return true;
}

// -- the job ---------------------------------------------------------------------------------------------------------

// Sets whether the job clamps and zeroes its gradient.
void ParamReader::set_clip_and_zeros(Reading& r) const {
  Job& job = r.job();
  job.clip_value = request_.clip_value;
  if (!request_.zeroes_grads) return;
  const TensorView& grad = r.views[kGrad];
  if (job.rows == nullptr && self_overlap(shape_of(grad), strides_of(grad)) != Overlap::none)
    fail(r.param, "zero_grad=True cannot zero its gradient, several of whose elements share the same memory");
  job.zeroes_grad = driver_.takes_followers() && job.rows == nullptr && !r.gradient.is_copy;
}

// Adds the gradient to those that are measured before the step.
void ParamReader::measure_gradient(const Reading& r) {
  if (!request_.norm) return;
  const bool on_gpu = r.own().cuda >= 0;
  Job& gradient = (on_gpu ? work_.measured_on_gpu[r.own().cuda] : work_.measured).emplace_back();
  const bool packed = r.job().rows != nullptr || (r.packed && r.has_strides_of_param(kGrad));
  gradient = gradient_job(r.views[kGrad], r.job().wide, packed, work_.layouts);
  gradient.length = r.job().length;
  gradient.rows = r.job().rows;
  if (!on_gpu) work_.measured_params.push_back(r.number);
  // The largest magnitude of complex numbers is not that of their parts.
  if (r.is_shard() || (r.own().complex && request_.norm->measure == Measure::largest_magnitude))
    work_.norm_is_partial = true;
}

// Sets the job's followers. Those that the driver does not update in this step were read only to be checked.
void ParamReader::set_followers(Reading& r) const {
  Job& job = r.job();
  const bool follows = job.rows == nullptr && driver_.takes_followers();
  r.param.followed = follows ? r.follows : 0;
  for (std::size_t f = 0; f < request_.followers.size(); ++f) {
    const FollowerRequest& follower = request_.followers[f];
    if (follows && follower.weight) {
      job.followers[f] = {.weight = *follower.weight, .sets_param = follower.sets_param};
    } else {
      job.operands[kFirstFollower + f] = {};
    }
  }
}

// Sets whether the job rounds with random bits, their seed, the parameter's number and the first index.
bool ParamReader::set_rounding(Reading& r) {
  Job& job = r.job();
  Rounding& rounding = job.rounding;
  rounding.stochastic = r.param.group->stochastic_rounding && !r.own().complex;
  if (rounding.stochastic) {
    bool rounds = false;
    for (std::size_t k = 0; k < kFirstFollower; ++k) rounds = rounds || job.rounds(k);
    rounding.stochastic = rounds;
  }
  r.param.rounds = rounding.stochastic || job.blocks.row_length != 0;
  if (!r.param.rounds) return true;
  if (job.wide && !r.own().on_cpu) return r.fall_back("stochastic rounding beside a float64 parameter on a GPU");
  rounding.seed = r.param.group->rounding_seed;
  rounding.param = first_param_ + r.number;
  if (r.is_shard()) rounding.first = r.param.spread.first_element(r.object, work_.ran_python);
  return true;
}

void ParamReader::make_constants(Reading& r) {
  r.scalars[0].value += 1.0;
  if (r.device_job.hyper == nullptr) {
    make_constants_here(r);
  } else if (!(info_.counts_steps && r.scalars[0].on_gpu) && r.param.group->device < 0) {
    RuleScalars scalars = scalars_of_rule(r);
    const double step = step_of(r);
    check_divisors(r.param, step, scalars);
    const StepMode mode;
    info_.advance(r.param.group->hyper.data(), step, scalars.data());
    for (std::size_t n = 0; n < own_scalars(); ++n) r.scalars[n + 1].value = scalars[n];
  }
  if (!r.param.rounds) return;
  if (!(r.scalars[0].value >= 0.0 && r.scalars[0].value < 0x1p63))
    fail(r.param, "its state step must be >= 0 and below 2^63");
  Rounding& rounding = r.job().rounding;
  rounding.step = static_cast<std::uint64_t>(r.scalars[0].value);
  rounding.key = random_key(rounding.seed, rounding.step, rounding.param);
}

// Returns the number of the rule's scalars, which are behind the step count.
std::size_t ParamReader::own_scalars() const { return names_.scalars.size() - (info_.counts_steps ? 1 : 0); }

RuleScalars ParamReader::scalars_of_rule(const Reading& r) const {
  RuleScalars scalars{};
  for (std::size_t n = 0; n < own_scalars(); ++n) scalars[n] = r.scalars[n + 1].value;
  return scalars;
}

// Returns the step for which constants are made, after it was counted.
double ParamReader::step_of(const Reading& r) const {
  return info_.counts_steps ? r.scalars[0].value : (r.param.fresh ? 1.0 : 2.0);
}

void ParamReader::check_divisors(const Param& param, double step, const RuleScalars& scalars) const {
  const char* const divisor = info_.zero_divisor(param.group->hyper.data(), step, scalars.data());
  if (divisor != nullptr) throw ZeroDivision(label_of(param) + ": " + divisor + " is zero");
}

// Makes the constants on the CPU, and advances the rule's scalars.
void ParamReader::make_constants_here(Reading& r) {
  const double step = step_of(r);
  const std::size_t own = own_scalars();
  const RuleScalars scalars = scalars_of_rule(r);
  const std::array<double, kMaxHyper>& hyper = r.param.group->hyper;
  MadeConstants& made = made_[r.job().wide ? 1 : 0];
  if (made.constants == nullptr || made.step != step || made.scalars != scalars || made.hyper != hyper) {
    check_divisors(r.param, step, scalars);
    ConstantsBuffer& buffer = work_.constants.emplace_back();
    const StepMode mode;  // so that the constants do not depend on the caller's rounding mode
    made = {hyper, step, scalars, scalars, buffer.bytes};
    info_.prepare(hyper.data(), step, scalars.data(), r.job().wide, buffer.bytes);
    info_.advance(hyper.data(), step, made.advanced.data());
  }
  r.job().constants = made.constants;
  for (std::size_t n = 0; n < own; ++n) r.scalars[n + 1].value = made.advanced[n];
  r.job().takes_sums = r.param.group->takes_sums;
  if (own == 0 || !r.job().takes_sums) return;
  r.job().scalars = work_.late_scalars.emplace_back(made.advanced).data();
  for (std::size_t n = 0; n < own; ++n) r.scalars[n + 1].late = &r.job().scalars[n];
}

void ParamReader::add_job(Reading& r) {
  Job& job = r.job();
  for (std::size_t n = 0; n < scalars_of(r.param); ++n)
    if (!r.scalars[n].on_gpu) work_.scalars.push_back(r.scalars[n]);
  if (job.rows == nullptr) {  // a sparse gradient's values have another shape, and everything is row-major
    bool flat = r.packed;
    for (std::size_t k = 0; k < kAllOperands; ++k)
      if (job.operands[k].data != nullptr || k < kFirstState) flat = flat && r.has_strides_of_param(k);
    driver_.locate_elements(work_, job, r.views, flat);
  }
  if (job.takes_sums && job.whole != 0) work_.summed_shards[r.own().cuda].push_back(r.number);
  if (r.own().cuda < 0) {
    work_.jobs.push_back(job);
  } else {
    work_.device_jobs[r.own().cuda].push_back(r.device_job);
  }
}

ParamReader::Outcome ParamReader::read(Param& param, std::size_t number, bool& memory_moved) {
  Reading r{
      .param = param, .number = number, .object = work_.params[number].ptr(), .gradient = work_.gradients[number]};
  param.followed = 0;
  param.zeroed = false;
  last_device_ = -1;
  if (r.gradient.original.is_none()) {
    forget_memory(param, memory_moved);
    return Outcome::no_gradient;
  }
  const auto fall_back = [&] {
    forget_memory(param, memory_moved);
    return Outcome::fallback;
  };
  param.reason = unsupported_reason(r);
  if (!param.reason.empty() || !read_own(r) || !read_gradient(r)) return fall_back();
  set_clip_and_zeros(r);
  if (!read_states(r) || !set_rounding(r) || !read_scalars(r)) return fall_back();
  last_device_ = r.own().cuda;
  note_memory(r, memory_moved);
  if (param.overlaps_itself) fail(param, "its own tensors (parameter, states, step) overlap in memory");
  if (param.shared || gradient_overlaps(r)) {
    param.reason =
        param.shared ? "memory shared with another parameter" : "gradient that overlaps its parameter or states";
    return Outcome::fallback;
  }
  if (!is_aligned(r)) return fall_back();
  work_.used.push_back(r.local);
  work_.used.push_back(r.gradient.readable.ptr());  // measured without the GIL also if a state is missing
  measure_gradient(r);
  if (r.missing) return Outcome::missing_state;
  const bool here = r.own().cuda < 0 && param.group->device < 0;
  if (!here && !choose_constants_device(r)) return fall_back();
  set_followers(r);
  param.zeroed = r.job().zeroes_grad;
  make_constants(r);
  add_job(r);
  return Outcome::job;
}

}  // namespace onepass
