#include "bindings/step_work.h"

namespace onepass {

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
