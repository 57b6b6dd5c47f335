// The measure phase: the sum of squares or the largest magnitude of each gradient, before any of them is used.
//
// Sums are in double, in which squares of float32 values can neither overflow nor underflow. They are divided into
// blocks of a fixed size, which are added in order. So no bit depends on threads or instruction sets.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "job.h"
#include "norm.h"

namespace onepass {

// Measures the gradient (operand kGrad) of each job, for an element count, layout or rows as in a step; the other
// operands are not used. Rows must be coalesced. NaN if an element is NaN.
std::vector<double> measure_gradients(Measure what, std::span<const Job> jobs, int threads);

// Combines the measures of several tensors, in this order. NaN if one of them is NaN.
double combine(Measure what, std::span<const double> measures);

// A kernel: measures elements [begin, end) of a job's gradient.
using MeasureKernel = double (*)(Measure what, const Job& job, std::int64_t begin, std::int64_t end);

}  // namespace onepass
