#include "bindings/step_work.h"

namespace py = pybind11;

namespace onepass {

PyTypeObject* step_result_type() {
  static PyStructSequence_Field fields[] = {
      {"stepped", "Whether the step was made. If not, nothing was done."},
      {"fallback", "(group, index, reason) of the parameters that torch's implementation has to step first."},
      {"unfollowed", "The parameters whose followers were not updated."},
      {nullptr, nullptr},
  };
  static PyStructSequence_Desc description{"onepass._core.StepResult", "The result of a step.", fields, 3};
  static PyTypeObject* const kType = PyStructSequence_NewType(&description);
  if (kType == nullptr) throw py::error_already_set();
  return kType;
}

py::object StepResult::to_python() const {
  auto result = py::reinterpret_steal<py::object>(PyStructSequence_New(step_result_type()));
  if (!result) throw py::error_already_set();
  PyStructSequence_SetItem(result.ptr(), 0, py::bool_(stepped).release().ptr());
  PyStructSequence_SetItem(result.ptr(), 1, py::object(fallback).release().ptr());
  PyStructSequence_SetItem(result.ptr(), 2, py::object(unfollowed).release().ptr());
  return result;
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
  stepped.clear();
  missing.clear();
  fallback.clear();
  used.clear();
  layouts.clear();
  rows.clear();
  constants.clear();
  ran_python = false;
  is_reread = true;
}

std::int64_t StepWork::bytes() const {
  std::int64_t bytes = 0;
  for (const Job& job : jobs) bytes += job.length * job.bytes_per_element();
  return bytes;
}

}  // namespace onepass
