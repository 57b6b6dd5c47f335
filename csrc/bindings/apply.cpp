#include "bindings/apply.h"

#include <array>
#include <memory>
#include <stdexcept>

#include "bindings/errors.h"
#include "bindings/rule_driver.h"
#include "cpu/fpmode.h"
#include "layout.h"
#include "rules/table.h"

namespace py = pybind11;

namespace onepass {
namespace {

[[noreturn]] void refuse(const std::string& what, const std::string& why) { throw py::value_error(what + " " + why); }

}  // namespace

void require_plain(PyObject* tensor, const std::string& what) {
  if (!is_plain(tensor)) refuse(what, "is a " + type_name(tensor) + ", not a plain tensor");
  TensorView view;
  if (!torch().dlpack.view(tensor, view)) refuse(what, "has no strided memory");
  if (is_lazy(tensor, view.complex)) refuse(what, "is negated or conjugated lazily");
}

TensorView require_view(PyObject* tensor, const std::string& what, bool may_be_on_cuda) {
  TensorView view;
  if (!torch().dlpack.view(tensor, view)) refuse(what, "has no strided memory");
  if (!view.on_cpu && !(may_be_on_cuda && view.cuda >= 0)) refuse(what, "is on device " + text_of(tensor, "device"));
  if (!view.format) refuse(what, "has dtype " + text_of(tensor, "dtype"));
  return view;
}

void apply(const std::string& rule_name, const std::vector<double>& hyper, double step, const py::list& rows,
           double grad_factor, int threads) {
  find_rule(rule_name);  // throws for Adafactor and CAME, which are not element-wise
  const std::unique_ptr<RuleDriver> driver = make_rule_driver(rule_name);
  const RuleInfo& info = driver->info();
  if (hyper.size() != info.hyper_names.size())
    throw std::invalid_argument("apply: hyper of rule " + rule_name + " must have " +
                                std::to_string(info.hyper_names.size()) + " numbers");
  if (!info.scalar_names.empty() || (info.sums != 0 && info.takes_sums(hyper.data())) || !info.takes_dense)
    throw std::invalid_argument("apply: rule " + rule_name + " has scalars or sums, or takes only sparse gradients");
  const unsigned states = info.states_used(hyper.data());

  if (const char* divisor = info.zero_divisor(hyper.data(), step, nullptr); divisor != nullptr)
    throw ZeroDivision(rule_name + ": " + divisor + " is zero");

  // Constants in float32 and in float64.
  alignas(std::max_align_t) std::array<std::array<std::byte, kMaxConstantBytes>, 2> constants;
  {
    const StepMode mode;
    for (const bool wide : {false, true})
      info.prepare(hyper.data(), step, nullptr, wide, constants[wide ? 1 : 0].data());
  }

  const auto label = [&](std::size_t row, std::size_t tensor) {
    return rule_name + ": tensor " + std::to_string(tensor) + " of row " + std::to_string(row);
  };
  std::vector<py::tuple> owned;  // the lists may change while Python code runs
  for (const py::handle& row : rows) owned.push_back(row.cast<py::tuple>());
  for (std::size_t r = 0; r < owned.size(); ++r)
    for (std::size_t t = 0; t < owned[r].size(); ++t) require_plain(py::object(owned[r][t]).ptr(), label(r, t));
  py::list written(owned.size());
  for (std::size_t r = 0; r < owned.size(); ++r) written[r] = owned[r][0];

  // From here on no Python code runs.
  StepWork work;
  for (std::size_t r = 0; r < owned.size(); ++r) {
    const py::tuple& row = owned[r];
    Views views;
    Job job;
    std::size_t at = 0;
    for (std::size_t k = 0; k < kFirstFollower; ++k) {
      if (k >= kFirstState && (states >> (k - kFirstState) & 1) == 0) continue;
      if (at == row.size()) refuse(label(r, at), "is missing");
      PyObject* const tensor = PyTuple_GET_ITEM(row.ptr(), static_cast<Py_ssize_t>(at));
      const std::string what = label(r, at);
      views[k] = require_view(tensor, what, true);
      if (!same_device(views[k], views[kParam])) refuse(what, "is on another device than the first");
      if (!same_shape(views[k], views[kParam])) refuse(what, "has another shape than the first");
      if (k != kGrad && self_overlap(shape_of(views[k]), strides_of(views[k])) != Overlap::none)
        refuse(what, "overlaps itself in memory");
      job.operands[k] = {views[k].data, *views[k].format};
      if (views[k].cuda >= 0 && reinterpret_cast<std::uintptr_t>(views[k].data) % size_of(*views[k].format) != 0)
        refuse(what, "is not aligned to its elements");
      work.used.push_back(tensor);
      ++at;
    }
    const TensorView& own = views[kParam];
    job.length = elements_of(own);
    job.wide = *own.format == Format::float64;
    job.grad_factor = grad_factor;
    job.constants = constants[job.wide ? 1 : 0].data();
    driver->locate_elements(work, job, views, false);
    if (own.cuda >= 0) {
      work.device_jobs[own.cuda].push_back({.job = job});
    } else {
      work.jobs.push_back(job);
    }
  }
  driver->run(work, threads);
  torch().increment_version(written);
}

}  // namespace onepass
