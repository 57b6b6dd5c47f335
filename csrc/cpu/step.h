// A whole step on the CPU: all tensors of all groups, in one parallel region; with sums over tensors, in two.
#pragma once

#include <span>
#include <vector>

#include "job.h"
#include "rules/table.h"

namespace onepass {

// Applies the rule to every job, with up to `threads` threads. Bits do not depend on the number of threads.
void run_step(RuleId rule, std::span<const Job> jobs, int threads);

// The same in two steps, for jobs that depend on sums over tensors of which they are shards (Job::whole). Returns the
// sums over each shard: as many numbers as the rule has sums.
std::vector<double> sum_shards(RuleId rule, std::span<const Job> shards, int threads);

// Completes the constants of a shard with the sums over the whole tensor, and writes the scalars. What is left of the
// step does not depend on sums.
void complete_shard(RuleId rule, Job& shard, const double* sums, ConstantsBuffer& constants);

}  // namespace onepass
