// Scales and clamps gradients in place, for functions that clip gradients outside of a step.
#pragma once

#include <cstdint>
#include <span>

#include "job.h"

namespace onepass {

// Multiplies the gradient (operand kGrad) of each job by its grad_factor, and clamps it to its clip_value. The other
// operands and members of a job are not used. No element may occur twice in a job. Elements that occur in several jobs
// are changed once for each, which needs `threads` 1.
void scale_gradients(std::span<const Job> jobs, int threads);

// Returns how many of at most `threads` threads scale_gradients uses.
int scale_team(std::span<const Job> jobs, int threads);

// A kernel: scales and clamps elements [begin, end) of a job's gradient.
using ScaleKernel = void (*)(const Job& job, std::int64_t begin, std::int64_t end);

}  // namespace onepass
