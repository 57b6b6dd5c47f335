#include "cpu/step.h"

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstring>
#include <vector>

#include "cpu/dispatch.h"
#include "cpu/fpmode.h"
#include "cpu/gradient_blocks.h"
#include "cpu/rows.h"
#include "cpu/team.h"
#include "cpu/tuning.h"
#include "rules/table.h"

namespace onepass {
namespace {

// Work is counted in bytes moved. The fixed cost of a tensor is counted as this many bytes.
constexpr std::int64_t kJobOverhead = 1024;
// Tensors are divided between threads at multiples of this many elements.
constexpr std::int64_t kGranule = 1024;

std::int64_t grad_bytes(const Job& job) { return static_cast<std::int64_t>(size_of(job.operands[kGrad].format)); }

std::int64_t cost_of(const Job& job) {
  std::int64_t bytes = job.bytes();
  if (job.rows != nullptr)  // every entry is read, also if several belong to one row
    bytes += (std::ssize(job.rows->entries) - job.rows->count()) * job.rows->length * grad_bytes(job);
  return kJobOverhead + bytes;
}

// Returns the element before which this share (0 to 1) of the job's bytes is moved.
double element_at(const Job& job, double share) {
  if (job.rows == nullptr || job.length == 0) return share * static_cast<double>(job.length);
  const Rows& rows = *job.rows;
  const std::int64_t row_bytes = job.bytes_per_element() - grad_bytes(job);
  const auto bytes_before = [&](std::int64_t row) {
    return static_cast<double>(row * row_bytes + rows.first[static_cast<std::size_t>(row)] * grad_bytes(job));
  };
  const double bytes = share * bytes_before(rows.count());
  std::int64_t row = 0;  // the last row with at most `bytes` before it
  for (std::int64_t end = rows.count(); end - row > 1;) {
    const std::int64_t middle = row + (end - row) / 2;
    (bytes_before(middle) <= bytes ? row : end) = middle;
  }
  const double within = (bytes - bytes_before(row)) / (bytes_before(row + 1) - bytes_before(row));
  return (static_cast<double>(row) + within) * static_cast<double>(rows.length);
}

// Calls work(job, begin, end) for share `index` of `count` equal shares of the whole work.
template <class Work>
void for_share(std::span<const Job> jobs, std::int64_t total, int index, int count, Work&& work) {
  const std::int64_t low = total / count * index;
  const std::int64_t high = index + 1 == count ? total : total / count * (index + 1);
  std::int64_t at = 0;
  for (const Job& job : jobs) {
    const std::int64_t cost = cost_of(job);
    // Returns the element at which a share that ends at `bound` ends in this job. The next share begins there.
    const auto split = [&](std::int64_t bound) {
      if (bound <= at) return std::int64_t{0};
      if (bound >= at + cost) return job.length;
      const auto element =
          static_cast<std::int64_t>(element_at(job, static_cast<double>(bound - at) / static_cast<double>(cost)));
      const std::int64_t granule = std::min(job.length, element / kGranule * kGranule);
      return job.blocks.row_length == 0 || granule == job.length ? granule : job.blocks.block_begin(granule);
    };
    const std::int64_t begin = split(low);
    const std::int64_t end = split(high);
    if (begin < end) work(job, begin, end);
    at += cost;
    if (at >= high) break;
  }
}

// -- sums over whole tensors -----------------------------------------------------------------------------------------

constexpr std::int64_t kSumBlock = 16'384;  // elements

// Steps all jobs of a rule whose update, or whose scalars, depend on sums. A tensor that is one block is stepped right
// after it is summed, while it is in the cache, and so is each block if the update itself does not depend on the sums.
// Returns the jobs that are left to step; those with sums have constants of their own.
std::vector<Job> step_with_sums(RuleId rule, std::span<const Job> jobs, int threads,
                                std::vector<ConstantsBuffer>& constants) {
  const RuleInfo& info = info_of(rule);
  const Kernels& kernels = active_isa().kernels;
  const Tuning& tuning = active_tuning();
  // A state that is stored in blocks is divided where such a block begins.
  const auto division = [](const Job& job, std::int64_t at) {
    return job.blocks.row_length == 0 || at == job.length ? at : job.blocks.block_begin(at);
  };
  const GradientBlocks blocks(jobs, kSumBlock, static_cast<int>(kFirstState + info.state_names.size()),
                              &Job::takes_sums);
  const auto is_one_block = [](const Job& job) { return job.length > 0 && job.length <= kSumBlock; };
  const auto is_left = [&](const Job& job) {
    return !job.takes_sums || (!info.sums_only_for_scalars && !is_one_block(job));
  };
  using Sums = std::array<double, kMaxSums>;
  const auto complete = [&](const Job& job, const Sums& sums, ConstantsBuffer& own) {
    std::memcpy(own.bytes, job.constants, info.constants_size[job.wide ? 1 : 0]);
    info.use_sums(job.wide, sums.data(), static_cast<double>(job.length), own.bytes, job.scalars);
  };

  // All memory is taken before anything is written.
  std::vector<Sums> of_blocks(blocks.all().size());
  std::vector<Job> left;
  const auto count = static_cast<std::size_t>(std::ranges::count_if(jobs, is_left));
  left.reserve(count);
  constants.resize(count);
  blocks.run(threads, [&](std::size_t number, const GradientBlock& block) {
    const Job& job = *block.job;
    const SumsKernel* const of_rules = kernels.of_type(job.wide).sums;
    const std::int64_t begin = division(job, block.begin), end = division(job, block.end);
    of_rules[static_cast<int>(rule)](job, begin, end, of_blocks[number].data());
    if (is_left(job)) return;
    ConstantsBuffer own;
    Job stepped = job;
    if (is_one_block(job)) {
      complete(job, of_blocks[number], own);
      stepped.constants = own.bytes;
    }
    kernels.run(rule, stepped, begin, end, tuning);
  });

  const StepMode mode;  // so that the constants do not depend on the caller's rounding mode
  std::size_t block = 0;
  for (const Job& job : jobs) {
    Sums sums{};
    for (; block < of_blocks.size() && blocks.all()[block].job == &job; ++block)
      for (std::size_t k = 0; k < info.sums; ++k) sums[k] += of_blocks[block][k];
    if (is_left(job)) {
      left.push_back(job);
      if (!job.takes_sums) continue;
      ConstantsBuffer& own = constants[left.size() - 1];
      complete(job, sums, own);
      left.back().constants = own.bytes;
    } else if (!is_one_block(job)) {
      ConstantsBuffer unused;  // the scalars alone are left to compute
      complete(job, sums, unused);
    }
  }
  return left;
}

}  // namespace

void run_step(RuleId rule, std::span<const Job> jobs, int threads) {
  const Kernels& kernels = active_isa().kernels;
  const Tuning& tuning = active_tuning();
  std::vector<ConstantsBuffer> constants;
  std::vector<Job> left;
  if (std::ranges::any_of(jobs, &Job::takes_sums)) {
    left = step_with_sums(rule, jobs, threads, constants);
    jobs = left;
  }
  std::int64_t total = 0;
  for (const Job& job : jobs) total += cost_of(job);

  on_team(team_size(total, threads), [&](int index, int count) {
    for_share(jobs, total, index, count, [&](const Job& job, std::int64_t begin, std::int64_t end) {
      kernels.run(rule, job, begin, end, tuning);
    });
  });
}

}  // namespace onepass
