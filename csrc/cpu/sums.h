// Sums whose bits depend only on the values: partial sums of a fixed size, in a fixed order. And maxima.
//
// A run of elements is summed in kSumLanes lanes, which are then added in double, the upper half to the lower, until
// one is left. So a compiler may use registers of any width. A run may come in parts, whose sizes depend on the shape
// and the format alone: element i of a part is in lane i mod kSumLanes. Runs are added in double, in order. Lanes in
// float have runs of at most kSumTile elements: a lane adds up at most 32 values, which keeps its rounding error below
// that of a sum over the whole tensor.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "rules/math.h"
#include "target.h"

namespace onepass::inline ONEPASS_TARGET {

inline constexpr std::int64_t kSumTile = 1024;
inline constexpr std::int64_t kSumLanes = 32;

// The lanes of N sums over a run, whose elements may come in several parts.
template <class T, std::size_t N>
class LaneSums {
 public:
  // Adds the values at i < n, for each sum, in one pass. value(i) must be a plain expression of element i of some
  // arrays. `before(i)` is called once for every kSumLanes elements. The next part begins with the first lane again.
  template <class Before, class... Values>
  ONEPASS_INLINE void add(std::int64_t n, Before&& before, Values&&... values) {
    static_assert(sizeof...(Values) == N);
    T lanes[N][kSumLanes];  // a copy, which the compiler keeps in registers
    std::memcpy(lanes, lanes_, sizeof lanes);
    std::int64_t i = 0;
    for (; i + kSumLanes <= n; i += kSumLanes) {
      before(i);
      auto* of_sum = lanes;
      const auto add_run = [&](auto&& value) {
        for (std::int64_t lane = 0; lane < kSumLanes; ++lane) (*of_sum)[lane] = plus((*of_sum)[lane], value(i + lane));
        ++of_sum;
      };
      (add_run(values), ...);
    }
    auto* of_sum = lanes;
    const auto add_rest = [&](auto&& value) {
      for (std::int64_t lane = 0; i + lane < n; ++lane) {
        (*of_sum)[lane] = plus((*of_sum)[lane], value(i + lane));
        asm volatile("");  // not vectorized: that would be more code, and no faster
      }
      ++of_sum;
    };
    (add_rest(values), ...);
    std::memcpy(lanes_, lanes, sizeof lanes);
  }

  // Adds the sums to those in `sums`.
  void add_to(double* sums) const {
    for (const auto& lanes : lanes_) {
      double totals[kSumLanes];
      for (std::int64_t lane = 0; lane < kSumLanes; ++lane) totals[lane] = static_cast<double>(lanes[lane]);
      for (std::int64_t half = kSumLanes / 2; half > 0; half /= 2)
        for (std::int64_t lane = 0; lane < half; ++lane) totals[lane] += totals[lane + half];
      *sums++ += totals[0];
    }
  }

 private:
  T lanes_[N][kSumLanes] = {};
};

// Adds the sums of several values over i < n to `sums`, in one pass, as LaneSums::add.
template <class T, class Before, class... Values>
ONEPASS_INLINE void add_sums_of(std::int64_t n, double* sums, Before&& before, Values&&... values) {
  LaneSums<T, sizeof...(Values)> lanes;
  lanes.add(n, before, values...);
  lanes.add_to(sums);
}

// Returns the sum of value(i) over i < n.
template <class T, class Value>
ONEPASS_INLINE double sum_of(std::int64_t n, Value&& value) {
  double sum = 0.0;
  add_sums_of<T>(n, &sum, [](std::int64_t) {}, value);
  return sum;
}

// Returns the largest magnitude; NaN if an element is NaN. The bits of a float without its sign, as an integer, have
// the order of magnitudes, with infinity and then NaN above. Compilers vectorize a maximum of integers.
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
