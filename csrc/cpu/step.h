// A whole step on the CPU: all tensors of all groups, in one parallel region; with sums over tensors, in two.
#pragma once

#include <span>

#include "job.h"

namespace onepass {

// Applies the rule to every job, with up to `threads` threads. Bits do not depend on the number of threads.
void run_step(RuleId rule, std::span<const Job> jobs, int threads);

}  // namespace onepass
