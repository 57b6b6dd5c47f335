// Sums whose bits depend only on the values: partial sums of a fixed size, in a fixed order. And maxima.
//
// A run of at most kSumTile elements is summed in kSumLanes lanes (element i in lane i mod kSumLanes) in the arithmetic
// type. The lanes are added in double, the upper half to the lower, until one is left. Longer sums add the sums of
// tiles in double, in order. So a compiler may use registers of any width. A lane adds up at most 32 values, which
// keeps its rounding error below that of a sum over the whole tensor.
#pragma once

#include <bit>
#include <cstdint>
#include <type_traits>

#include "target.h"

namespace onepass::inline ONEPASS_TARGET {

inline constexpr std::int64_t kSumTile = 1024;
inline constexpr std::int64_t kSumLanes = 32;

// Adds the sums of several values over i < n to `sums`, in one pass. value(i) must be a plain expression of element i
// of some arrays. `before(i)` is called once for every run of kSumLanes elements.
template <class T, class Before, class... Values>
ONEPASS_INLINE void add_sums_of(std::int64_t n, double* sums, Before&& before, Values&&... values) {
  T lanes[sizeof...(Values)][kSumLanes] = {};
  std::int64_t i = 0;
  for (; i + kSumLanes <= n; i += kSumLanes) {
    before(i);
    auto* own = lanes;
    const auto add = [&](auto&& value) {
      for (std::int64_t lane = 0; lane < kSumLanes; ++lane) (*own)[lane] += value(i + lane);
      ++own;
    };
    (add(values), ...);
  }
  auto* own = lanes;
  const auto finish = [&](auto&& value) {
    for (std::int64_t lane = 0; i + lane < n; ++lane) (*own)[lane] += value(i + lane);
    double totals[kSumLanes];
    for (std::int64_t lane = 0; lane < kSumLanes; ++lane) totals[lane] = static_cast<double>((*own)[lane]);
    for (std::int64_t half = kSumLanes / 2; half > 0; half /= 2)
      for (std::int64_t lane = 0; lane < half; ++lane) totals[lane] += totals[lane + half];
    *sums++ += totals[0];
    ++own;
  };
  (finish(values), ...);
}

// Returns the sum of value(i) over i < n.
template <class T, class Value>
ONEPASS_INLINE double sum_of(std::int64_t n, Value&& value) {
  double sum = 0.0;
  add_sums_of<T>(n, &sum, [](std::int64_t) {}, value);
  return sum;
}

// Returns the largest magnitude; NaN if an element is NaN. The bits of a float without its sign, as an integer, have
// the order of magnitudes, with infinity and then NaN above. Compilers vectorise a maximum of integers.
template <class T>
double largest_of(const T* tile, std::int64_t n) {
  using Bits = std::conditional_t<sizeof(T) == 4, std::int32_t, std::int64_t>;
  Bits most = 0;
  for (std::int64_t i = 0; i < n; ++i) {
    const Bits magnitude = std::bit_cast<Bits>(tile[i]) & ~(Bits{1} << (8 * sizeof(T) - 1));
    most = magnitude > most ? magnitude : most;
  }
  return static_cast<double>(std::bit_cast<T>(most));
}

}  // namespace onepass::inline ONEPASS_TARGET
