#include "cpu/measure.h"

#include <algorithm>

#include "cpu/dispatch.h"
#include "cpu/fpmode.h"
#include "cpu/team.h"

namespace onepass {
namespace {

constexpr std::int64_t kBlock = 16'384;  // elements
// Work is counted in bytes read. The fixed cost of a tensor is counted as this many bytes.
constexpr std::int64_t kJobOverhead = 512;

struct Block {
  const Job* job;
  std::int64_t begin;
};

}  // namespace

std::vector<double> measure_gradients(Measure what, std::span<const Job> jobs, int threads) {
  std::vector<Block> blocks;
  blocks.reserve(jobs.size());
  std::int64_t bytes = 0;
  for (const Job& job : jobs) {
    for (std::int64_t begin = 0; begin < job.length; begin += kBlock) blocks.push_back({&job, begin});
    bytes += kJobOverhead + job.length * static_cast<std::int64_t>(size_of(job.operands[kGrad].format));
  }

  std::vector<double> measures(blocks.size());
  const Kernels& kernels = *active_isa().kernels;
  on_team(team_size(bytes, threads), [&](int index, int count) {
    const auto share = [&](int i) {
      return blocks.size() * static_cast<std::size_t>(i) / static_cast<std::size_t>(count);
    };
    for (std::size_t b = share(index); b < share(index + 1); ++b) {
      const auto [job, begin] = blocks[b];
      const MeasureKernel kernel = job->wide ? kernels.measure_wide : kernels.measure_narrow;
      measures[b] = kernel(what, *job, begin, std::min(begin + kBlock, job->length));
    }
  });

  const StepMode mode;
  std::vector<double> of_jobs;
  of_jobs.reserve(jobs.size());
  std::size_t first = 0;
  for (const Job& job : jobs) {
    std::size_t past = first;
    while (past < blocks.size() && blocks[past].job == &job) ++past;
    of_jobs.push_back(combine(what, std::span(measures).subspan(first, past - first)));
    first = past;
  }
  return of_jobs;
}

double combine(Measure what, std::span<const double> measures) {
  double total = 0.0;
  for (const double measure : measures) total = combined(what, total, measure);
  return total;
}

}  // namespace onepass
