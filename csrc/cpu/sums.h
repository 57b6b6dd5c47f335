// Sums whose bits depend on nothing but the numbers: partial sums of a fixed size, in a fixed order.
//
// A run of at most kSumTile elements is summed in kSumLanes lanes (element i in lane i mod kSumLanes) in the arithmetic
// type, and the lanes are added in double, the lower half to the upper, until one is left. Whoever sums more adds the
// sums of tiles in double, in order. So a compiler may use registers of any width, and a lane adds up 32 numbers at
// most, which keeps its rounding below that of a sum over the whole tensor.
#pragma once

#include <cstdint>

#include "target.h"

namespace onepass::inline ONEPASS_TARGET {

inline constexpr std::int64_t kSumTile = 1024;
inline constexpr std::int64_t kSumLanes = 32;

// The sum over i < n of value(i), which must be a plain expression of element i of some arrays.
template <class T, class Value>
ONEPASS_INLINE double sum_of(std::int64_t n, Value&& value) {
  T lanes[kSumLanes] = {};
  std::int64_t i = 0;
  for (; i + kSumLanes <= n; i += kSumLanes)
    for (std::int64_t lane = 0; lane < kSumLanes; ++lane) lanes[lane] += value(i + lane);
  for (std::int64_t lane = 0; i + lane < n; ++lane) lanes[lane] += value(i + lane);
  double sums[kSumLanes];
  for (std::int64_t lane = 0; lane < kSumLanes; ++lane) sums[lane] = static_cast<double>(lanes[lane]);
  for (std::int64_t half = kSumLanes / 2; half > 0; half /= 2)
    for (std::int64_t lane = 0; lane < half; ++lane) sums[lane] += sums[lane + half];
  return sums[0];
}

}  // namespace onepass::inline ONEPASS_TARGET
