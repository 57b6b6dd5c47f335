#include "bindings/step_work.h"

#include <cmath>
#include <span>
#include <utility>

#include "layout.h"

namespace py = pybind11;

namespace onepass {

PyTypeObject* step_result_type() {
  static PyStructSequence_Field fields[] = {
      {"stepped", "Whether the step was made. If not, nothing was done."},
      {"fallback", "(group, index, reason) of the parameters that torch's implementation has to step first."},
      {"unfollowed", "For each follower, the parameters for which it was not updated."},
      {"unzeroed", "The parameters whose gradients were not zeroed."},
      {"measures", "With a fallback: the measure of each gradient, None where it was not measured."},
      {"norm", "The norm of the gradients, None if it was not measured."},
      {"coefficient", "The factor by which the gradients were clipped."},
      {"skipped", "Whether the step was skipped because of the norm."},
      {"device_clipping", "In place of these three, if only the GPU has them: three float64 as bytes. Else None."},
      {nullptr, nullptr},
  };
  static PyStructSequence_Desc description{"onepass._core.StepResult", "The result of a step.", fields, 9};
  static PyTypeObject* const kType = PyStructSequence_NewType(&description);
  if (kType == nullptr) throw py::error_already_set();
  return kType;
}

py::object StepResult::to_python() const {
  auto result = py::reinterpret_steal<py::object>(PyStructSequence_New(step_result_type()));
  if (!result) throw py::error_already_set();
  const auto set = [&](Py_ssize_t field, py::object value) {
    PyStructSequence_SetItem(result.ptr(), field, value.release().ptr());
  };
  set(0, py::bool_(stepped));
  set(1, fallback);
  set(2, unfollowed);
  set(3, unzeroed);
  set(4, measures);
  set(5, clipping ? py::object(py::float_(clipping->norm)) : py::object(py::none()));
  set(6, py::float_(clipping ? clipping->coefficient : 1.0));
  set(7, py::bool_(clipping && clipping->skips));
  set(8, device_clipping);
  return result;
}

Clipping clipping_for(const NormRequest& request, double norm) {
  Clipping clipping = clipping_for(request.limits, norm);
  if (!request.policy.is_none() && std::isfinite(norm)) {
    clipping.coefficient = request.policy(norm).cast<double>();
    clipping.skips = clipping.coefficient == 0.0;
  }
  return clipping;
}

Job gradient_job(const TensorView& gradient, bool wide, bool packed, std::list<Layout>& layouts) {
  Job job;
  job.operands[kGrad] = {gradient.data, *gradient.format};
  job.length = elements_of(gradient);
  job.wide = wide;
  if (packed) return job;
  std::array<std::span<const std::int64_t>, kMaxOperands> strides;
  strides[kParam] = strides[kGrad] = strides_of(gradient);
  Layout layout = make_layout(shape_of(gradient), strides);
  if (!is_flat(layout)) job.layout = &layouts.emplace_back(std::move(layout));
  return job;
}

void StepWork::reserve(std::size_t count) {
  constexpr std::size_t kUsedByMost = 5;  // parameter, gradient, two states, step
  jobs.reserve(count);
  scalars.reserve(count);
  stepped.reserve(count);
  used.reserve(kUsedByMost * count);
}

void StepWork::restart() {
  jobs.clear();
  device_jobs.clear();
  factored_jobs.clear();
  scalars.clear();
  late_scalars.clear();
  stepped.clear();
  summed_shards.clear();
  missing.clear();
  fallback.clear();
  changed.clear();
  used.clear();
  measured.clear();
  measured_params.clear();
  measured_on_gpu.clear();
  norm_is_partial = false;
  layouts.clear();
  rows.clear();
  constants.clear();
  rows_are_coalesced = false;
  ran_python = false;
  is_reread = true;
}

void StepWork::coalesce_rows() {
  if (std::exchange(rows_are_coalesced, true)) return;
  for (Rows& own : rows) coalesce(own);
  for (std::vector<Job>* const list : {&jobs, &measured})
    for (Job& job : *list)
      if (job.rows != nullptr) job.length = job.rows->count() * job.rows->length;
}

void StepWork::scale_gradients(double factor) {
  if (factor == 1.0) return;
  for (Job& job : jobs) job.grad_factor *= factor;
  for (FactoredJob& job : factored_jobs) job.grad_factor *= factor;
  for (auto& [device, own] : device_jobs)
    for (cuda::DeviceJob& job : own) job.job.grad_factor *= factor;
}

py::list StepWork::summed_shards_on(int device) const {
  py::list dtensors;
  if (const auto found = summed_shards.find(device); found != summed_shards.end())
    for (const std::size_t k : found->second) dtensors.append(params[k]);
  return dtensors;
}

std::int64_t StepWork::bytes() const {
  std::int64_t bytes = 0;
  for (const Job& job : jobs) bytes += job.bytes();
  return bytes;
}

}  // namespace onepass
