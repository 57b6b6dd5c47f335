#include "bindings/apply.h"

#include <array>
#include <deque>
#include <map>
#include <stdexcept>

#include "bindings/cuda.h"
#include "cpu/fpmode.h"
#include "cpu/step.h"
#include "layout.h"
#include "rules/table.h"

namespace py = pybind11;

namespace onepass {

TensorView require_view(PyObject* tensor, const std::string& what, bool may_be_on_cuda) {
  const auto refuse = [&](const std::string& why) { throw py::value_error(what + " " + why); };
  TensorView view;
  if (!is_plain(tensor)) refuse("is a " + type_name(tensor) + ", not a plain tensor");
  if (!torch().dlpack.view(tensor, view)) refuse("has no strided memory");
  if (!view.on_cpu && !(may_be_on_cuda && view.cuda >= 0)) refuse("is on device " + text_of(tensor, "device"));
  if (!view.format) refuse("has dtype " + text_of(tensor, "dtype"));
  if (is_lazy(tensor, view)) refuse("is negated or conjugated lazily");
  return view;
}

void apply(const std::string& rule_name, const std::vector<double>& hyper, double step, const py::list& rows,
           double grad_factor, int threads) {
  const RuleId rule = find_rule(rule_name);
  const RuleInfo& info = info_of(rule);
  if (hyper.size() != info.hyper_names.size() || !info.scalar_names.empty())
    throw std::invalid_argument("rule " + rule_name + " takes " + std::to_string(info.hyper_names.size()) +
                                " hyperparameters, and scalars that only a plan reads");
  const unsigned used = info.states_used(hyper.data());

  // Constants in float32 and in float64.
  alignas(std::max_align_t) std::array<std::array<std::byte, kMaxConstantBytes>, 2> constants;
  {
    const StepMode mode;
    for (const bool wide : {false, true}) info.prepare(hyper.data(), step, nullptr, wide, constants[wide].data());
  }

  std::vector<Job> jobs;
  std::map<int, std::vector<cuda::DeviceJob>> device_jobs;
  std::deque<Layout> layouts;
  for (std::size_t r = 0; r < rows.size(); ++r) {
    const auto row = rows[r].cast<py::tuple>();
    std::array<TensorView, kMaxOperands> views;
    std::array<std::span<const std::int64_t>, kMaxOperands> strides;
    Job job;
    std::size_t at = 0;
    for (std::size_t k = 0; k < kMaxOperands; ++k) {
      if (k >= kFirstState && (used >> (k - kFirstState) & 1) == 0) continue;
      const std::string what = rule_name + ": tensor " + std::to_string(at) + " of row " + std::to_string(r);
      if (at == row.size()) throw py::value_error(what + " is missing");
      views[k] = require_view(row[at].ptr(), what, true);
      if (!same_device(views[k], views[kParam])) throw py::value_error(what + " is on another device than the first");
      if (!same_shape(views[k], views[kParam])) throw py::value_error(what + " has another shape than the first");
      if (k != kGrad && self_overlap(shape_of(views[k]), strides_of(views[k])) != Overlap::none)
        throw py::value_error(what + " overlaps itself in memory");
      strides[k] = strides_of(views[k]);
      job.operands[k] = {views[k].data, *views[k].format};
      if (views[k].cuda >= 0 && reinterpret_cast<std::uintptr_t>(views[k].data) % size_of(*views[k].format) != 0)
        throw py::value_error(what + " is not aligned to its elements");
      ++at;
    }
    const TensorView& own = views[kParam];
    job.length = 1;
    for (int d = 0; d < own.ndim; ++d) job.length *= own.shape[d];
    job.wide = *own.format == Format::float64;
    job.grad_factor = grad_factor;
    job.constants = constants[job.wide].data();
    if (job.length > 0) {
      Layout layout = make_layout(shape_of(own), strides);
      if (!is_flat(layout)) job.layout = &layouts.emplace_back(std::move(layout));
    }
    if (own.cuda >= 0) {
      device_jobs[own.cuda].push_back({.job = job});
    } else {
      jobs.push_back(job);
    }
  }
  for (const auto& [device, its_jobs] : device_jobs) step_on_cuda(rule, device, its_jobs, {});
  {
    const py::gil_scoped_release release;
    run_step(rule, jobs, threads);
  }
  py::list written(rows.size());
  for (std::size_t r = 0; r < rows.size(); ++r) written[r] = rows[r].cast<py::tuple>()[0];
  torch().increment_version(written);
}

}  // namespace onepass
