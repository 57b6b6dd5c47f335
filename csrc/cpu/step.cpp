#include "cpu/step.h"

#include <omp.h>

#include <algorithm>

#include "cpu/dispatch.h"
#include "cpu/fpmode.h"
#include "cpu/team.h"

namespace onepass {
namespace {

// Work is counted in bytes moved, with a tensor's fixed cost expressed in the same coin.
constexpr std::int64_t kJobOverhead = 1024;
// Tensors are divided between threads at multiples of this many elements.
constexpr std::int64_t kGranule = 1024;

std::int64_t cost_of(const Job& job) { return kJobOverhead + job.length * job.bytes_per_element(); }

// Calls work(job, begin, end) for share number `index` of `count` equal shares of all the work.
template <class Work>
void for_share(std::span<const Job> jobs, std::int64_t total, int index, int count, Work&& work) {
  const std::int64_t low = total / count * index;
  const std::int64_t high = index + 1 == count ? total : total / count * (index + 1);
  std::int64_t at = 0;
  for (const Job& job : jobs) {
    const std::int64_t cost = cost_of(job);
    // The element at which a share that ends at `bound` ends in this job: the same for the thread before and after.
    const auto split = [&](std::int64_t bound) {
      if (bound <= at) return std::int64_t{0};
      if (bound >= at + cost) return job.length;
      const auto element = static_cast<std::int64_t>(static_cast<double>(bound - at) / static_cast<double>(cost) *
                                                     static_cast<double>(job.length));
      return std::min(job.length, element / kGranule * kGranule);
    };
    const std::int64_t begin = split(low);
    const std::int64_t end = split(high);
    if (begin < end) work(job, begin, end);
    at += cost;
    if (at >= high) break;
  }
}

}  // namespace

void run_step(RuleId rule, std::span<const Job> jobs, int threads) {
  const Kernels& kernels = *active_isa().kernels;
  std::int64_t total = 0;
  for (const Job& job : jobs) total += cost_of(job);

  const int team = team_size(threads, total);
  if (team == 1) {
    const StepMode mode;
    for (const Job& job : jobs) kernels.run(rule, job, 0, job.length);
    return;
  }
#pragma omp parallel num_threads(team)
  {
    const StepMode mode;
    for_share(jobs, total, omp_get_thread_num(), omp_get_num_threads(),
              [&](const Job& job, std::int64_t begin, std::int64_t end) { kernels.run(rule, job, begin, end); });
  }
}

}  // namespace onepass
