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

using Sums = std::array<double, kMaxSums>;

// The blocks of the tensors that sums are over. With `only`, the other jobs have none.
GradientBlocks summed_blocks(const RuleInfo& info, std::span<const Job> jobs, bool Job::* only = nullptr) {
  return {jobs, kSumBlock, static_cast<int>(kFirstState + info.state_names.size()), only};
}

// The elements of a block. A state that is stored in blocks is divided where such a block begins.
struct Range {
  explicit Range(const GradientBlock& block)
      : begin(division(*block.job, block.begin)), end(division(*block.job, block.end)) {}
  static std::int64_t division(const Job& job, std::int64_t at) {
    return job.blocks.row_length == 0 || at == job.length ? at : job.blocks.block_begin(at);
  }
  std::int64_t begin, end;
};

Sums sum_block(RuleId rule, const GradientBlock& block) {
  const Range range(block);
  const SumsKernel* const of_rules = active_isa().kernels.of_type(block.job->wide).sums;
  Sums sums{};
  of_rules[static_cast<int>(rule)](*block.job, range.begin, range.end, sums.data());
  return sums;
}

// Adds up the sums of a job's blocks, which begin at number `block`, and advances it.
Sums sum_of_job(const RuleInfo& info, const Job& job, const GradientBlocks& blocks, const std::vector<Sums>& of_blocks,
                std::size_t& block) {
  Sums sums{};
  for (; block < of_blocks.size() && blocks.all()[block].job == &job; ++block)
    for (std::size_t k = 0; k < info.sums; ++k) sums[k] += of_blocks[block][k];
  return sums;
}

// Completes a job's constants with its sums, and writes its scalars.
void complete(const RuleInfo& info, const Job& job, const double* sums, ConstantsBuffer& own) {
  std::memcpy(own.bytes, job.constants, info.constants_size[job.wide ? 1 : 0]);
  info.use_sums(job.wide, sums, static_cast<double>(job.whole != 0 ? job.whole : job.length), own.bytes, job.scalars);
}

// Steps all jobs of a rule whose update, or whose scalars, depend on sums. A tensor that is one block is stepped right
// after it is summed, while it is in the cache, and so is each block if the update itself does not depend on the sums.
// Returns the jobs that are left to step; those with sums have constants of their own.
std::vector<Job> step_with_sums(RuleId rule, std::span<const Job> jobs, int threads,
                                std::vector<ConstantsBuffer>& constants) {
  const RuleInfo& info = info_of(rule);
  const Kernels& kernels = active_isa().kernels;
  const Tuning& tuning = active_tuning();
  const GradientBlocks blocks = summed_blocks(info, jobs, &Job::takes_sums);
  const auto is_one_block = [](const Job& job) { return job.length > 0 && job.length <= kSumBlock; };
  const auto is_left = [&](const Job& job) {
    return !job.takes_sums || (!info.sums_only_for_scalars && !is_one_block(job));
  };

  // All memory is taken before anything is written.
  std::vector<Sums> of_blocks(blocks.all().size());
  std::vector<Job> left;
  const auto count = static_cast<std::size_t>(std::ranges::count_if(jobs, is_left));
  left.reserve(count);
  constants.resize(count);
  blocks.run(threads, [&](std::size_t number, const GradientBlock& block) {
    const Job& job = *block.job;
    of_blocks[number] = sum_block(rule, block);
    if (is_left(job)) return;
    ConstantsBuffer own;
    Job stepped = job;
    if (is_one_block(job)) {
      complete(info, job, of_blocks[number].data(), own);
      stepped.constants = own.bytes;
    }
    const Range range(block);
    kernels.run(rule, stepped, range.begin, range.end, tuning);
  });

  const StepMode mode;  // so that the constants do not depend on the caller's rounding mode
  std::size_t block = 0;
  for (const Job& job : jobs) {
    const Sums sums = sum_of_job(info, job, blocks, of_blocks, block);
    if (is_left(job)) {
      left.push_back(job);
      if (!job.takes_sums) continue;
      ConstantsBuffer& own = constants[left.size() - 1];
      complete(info, job, sums.data(), own);
      left.back().constants = own.bytes;
    } else if (!is_one_block(job)) {
      ConstantsBuffer unused;  // the scalars alone are left to compute
      complete(info, job, sums.data(), unused);
    }
  }
  return left;
}

}  // namespace

std::vector<double> sum_shards(RuleId rule, std::span<const Job> shards, int threads) {
  const RuleInfo& info = info_of(rule);
  const GradientBlocks blocks = summed_blocks(info, shards);
  std::vector<Sums> of_blocks(blocks.all().size());
  blocks.run(threads,
             [&](std::size_t number, const GradientBlock& block) { of_blocks[number] = sum_block(rule, block); });
  const StepMode mode;  // so that the sums do not depend on the caller's rounding mode
  std::vector<double> all;
  std::size_t block = 0;
  for (const Job& shard : shards) {
    const Sums sums = sum_of_job(info, shard, blocks, of_blocks, block);
    all.insert(all.end(), sums.begin(), sums.begin() + static_cast<std::ptrdiff_t>(info.sums));
  }
  return all;
}

void complete_shard(RuleId rule, Job& shard, const double* sums, ConstantsBuffer& constants) {
  const StepMode mode;  // so that the constants do not depend on the caller's rounding mode
  complete(info_of(rule), shard, sums, constants);
  shard.constants = constants.bytes;
  shard.takes_sums = false;
}

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
