// What is measured of the gradients before a step, and how the step depends on it.
#pragma once

#include <cstdint>
#include <limits>

#include "job.h"
#include "rules/math.h"
#include "target.h"

namespace onepass {

enum class Measure : std::uint8_t { sum_of_squares, largest_magnitude };

struct NormLimits {
  double max_norm = kNoLimit;    // gradients are multiplied by min(1, max_norm / (norm + 1e-6))
  bool skips_nonfinite = false;  // a norm that is infinite or NaN skips the step
};

struct Clipping {
  double norm = 0.0;
  double coefficient = 1.0;
  bool skips = false;
};

inline namespace ONEPASS_TARGET {

// Combines the measures of two parts. NaN if either is NaN.
template <class T>
ONEPASS_INLINE T combined(Measure what, T a, T b) {
  return what == Measure::largest_magnitude ? maximum(a, b) : a + b;
}

// Returns the norm of what was measured.
ONEPASS_INLINE double norm_of(Measure what, double measured) {
  return what == Measure::sum_of_squares ? square_root(measured) : measured;
}

ONEPASS_SETUP inline Clipping clipping_for(const NormLimits& limits, double norm) {
  Clipping clipping{.norm = norm};
  const bool is_finite = magnitude(norm) <= std::numeric_limits<double>::max();
  if (!is_finite && limits.skips_nonfinite) {
    clipping.skips = true;
  } else if (limits.max_norm != kNoLimit) {
    const double coefficient = limits.max_norm / (norm + 1e-6);
    clipping.coefficient = coefficient > 1.0 ? 1.0 : coefficient;  // NaN stays NaN
  }
  return clipping;
}

}  // namespace ONEPASS_TARGET

}  // namespace onepass
