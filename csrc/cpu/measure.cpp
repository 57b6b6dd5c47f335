#include "cpu/measure.h"

#include "cpu/dispatch.h"
#include "cpu/fpmode.h"
#include "cpu/gradient_blocks.h"

namespace onepass {
namespace {

constexpr std::int64_t kMeasureBlock = 16'384;  // elements

}  // namespace

std::vector<double> measure_gradients(Measure what, std::span<const Job> jobs, int threads) {
  const GradientBlocks blocks(jobs, kMeasureBlock, 1);
  std::vector<double> measures(blocks.all().size());
  const Kernels& kernels = active_isa().kernels;
  blocks.run(threads, [&](std::size_t number, const GradientBlock& block) {
    const MeasureKernel kernel = kernels.of_type(block.job->wide).measure;
    measures[number] = kernel(what, *block.job, block.begin, block.end);
  });

  const StepMode mode;
  std::vector<double> of_jobs;
  of_jobs.reserve(jobs.size());
  std::size_t first = 0;
  for (const Job& job : jobs) {
    std::size_t past = first;
    while (past < measures.size() && blocks.all()[past].job == &job) ++past;
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
