// Gradients that are measured, and their measures by definition.
#pragma once

#include <cmath>
#include <limits>
#include <vector>

#include "job.h"
#include "reference.h"
#include "sum.h"

namespace onepass::testing {

// The gradient's elements in the order of the layout: that of its strides.
inline std::vector<double> elements(Problem& problem) {
  std::vector<double> values;
  Tensor& grad = problem.tensors[kGrad];
  const bool is_double = problem.wide && grad.format == Format::float64;
  const double smallest = is_double ? std::numeric_limits<double>::min() : std::numeric_limits<float>::min();
  for_each_index(problem.shape, [&](const auto& index) {
    const std::int64_t offset = offset_of(index, grad.strides);
    const double value = problem.wide ? load<double>(grad, offset) : double{load<float>(grad, offset)};
    values.push_back(std::fabs(value) < smallest ? 0.0 : value);  // a step reads denormals as zeros
  });
  return values;
}

inline double expected_squares(const std::vector<double>& values) {
  Sum sum(Sum::kChunk);  // a run is a whole chunk
  for (const double value : values) sum.add(value * value);
  return sum.total();
}

inline double expected_largest(const std::vector<double>& values) {
  double largest = 0.0;
  for (const double value : values) largest = std::isnan(value) ? value : std::fmax(largest, std::fabs(value));
  return largest;
}

// A job of the gradient alone.
inline Job gradient_of(Problem& problem) {
  Job job;
  job.operands[kGrad] = {problem.tensors[kGrad].at(0), problem.tensors[kGrad].format};
  job.length = length_of(problem);
  job.wide = problem.wide;
  return job;
}

}  // namespace onepass::testing
