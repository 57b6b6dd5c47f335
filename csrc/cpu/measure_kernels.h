// The kernels of the measure phase.
#pragma once

#include <cstdint>

#include "cpu/measure.h"
#include "cpu/sums.h"
#include "cpu/tile.h"
#include "rules/math.h"
#include "target.h"

namespace onepass::inline ONEPASS_TARGET {

// T is the arithmetic type of the step, in which the gradient is decoded.
template <class T>
double measure(Measure what, const Job& job, std::int64_t begin, std::int64_t end) {
  alignas(64) T tile[kSumTile];
  const Operand& grad = job.operands.data()[kGrad];
  const bool in_place = job.rows == nullptr && job.layout == nullptr && is_plain_array<T>(grad);
  double measured = 0.0;
  LaneSums<double, 1> squares;
  for (std::int64_t at = begin; at < end; at += kSumTile) {
    const std::int64_t n = end - at < kSumTile ? end - at : kSumTile;
    const T* values = tile;
    if (in_place) {
      values = reinterpret_cast<const T*>(grad.data) + at;
    } else {
      decode(job, kGrad, at, n, tile);
    }
    if (what == Measure::largest_magnitude) {
      measured = maximum(measured, largest_of(values, n));
    } else {
      squares.add(n, [](std::int64_t) {}, [&](std::int64_t i) { return squared(values[i]); });
    }
  }
  if (what == Measure::sum_of_squares) squares.add_to(&measured);
  return measured;
}

}  // namespace onepass::inline ONEPASS_TARGET
