// The kernels that measure gradients and decide how the step depends on their norm: the work of one thread. Plain C++,
// so that the tests run the same lines on the CPU.
//
// Sums are in double, in which squares of float32 values can neither overflow nor underflow. Each thread of a block
// adds the same elements in every run, and the threads' sums are added in pairs. So the result has the same bits in
// every run on GPUs with as many multiprocessors, if shapes, formats, layouts and alignments are the same. A CPU adds
// in another order.
#pragma once

#include "cuda/kernel.h"
#include "norm.h"

namespace onepass::inline ONEPASS_TARGET {

// The type in which elements are measured: double only where it is needed, because most GPUs are slow in it.
template <Measure what, class T>
using Measured = std::conditional_t<what == Measure::sum_of_squares, double, T>;

// Measures one more element.
template <Measure what, class T>
ONEPASS_INLINE Measured<what, T> with_element(Measured<what, T> measured, T x) {
  if constexpr (what == Measure::sum_of_squares) {
    const auto value = static_cast<double>(flushed(x));
    return __builtin_fma(value, value, measured);  // one operation; the square of a float is exact in double
  } else {
    return combined(what, measured, magnitude(flushed(x)));
  }
}

// Measures the share of one thread of the block's chunk of a row, whose only operand is its gradient.
template <Measure what, class T, class TableType>
ONEPASS_INLINE double measure_chunk(const TableType& table, std::uint32_t block, std::uint32_t thread) {
  constexpr int width = kWidth<T>;
  const Row row = reinterpret_cast<const Row*>(table.words)[find_row(table, block)];
  const Share share(row, table.header.chunk, block, width);
  const std::uint64_t data = table.words[row.pointers];
  const Format format = format_of(row, static_cast<int>(kGrad));
  Measured<what, T> measured = 0;
  if (row.access == Access::elements) {
    const std::uint64_t* layout = row.has_layout != 0 ? table.words + row.layout : nullptr;
    for (std::int64_t at = share.begin + thread; at < share.end; at += cuda::kThreads) {
      std::int64_t offset[1];
      find_offsets(layout, at, [](int) { return true; }, offset);
      measured = with_element<what, T>(measured, load_element<T>(format, data, offset[0]));
    }
    return measured;
  }
  if (thread < share.singles(width))
    measured = with_element<what, T>(measured, load_element<T>(format, data, share.single(thread, width)));
  Measured<what, T> lanes[width] = {};
  with_format(format, [&]<class Codec>(Codec) {
    constexpr int bytes = sizeof(typename Codec::Storage) * width;
    if constexpr (bytes <= static_cast<int>(sizeof(Vector))) {
      const std::uint64_t first = data + static_cast<std::uint64_t>(share.first_vector()) * (bytes / width);
#pragma unroll 4
      for (std::uint32_t v = thread; v < share.vectors; v += cuda::kThreads) {
        T values[width];
        decode_as<Codec>(load_words<bytes / 4>(first + std::uint64_t{v} * bytes), values);
#pragma unroll
        for (int i = 0; i < width; ++i) lanes[i] = with_element<what, T>(lanes[i], values[i]);
      }
    }
  });
#pragma unroll
  for (int i = 0; i < width; ++i) measured = combined(what, measured, lanes[i]);
  return measured;
}

// Returns the share of one thread of a decision's measures.
ONEPASS_INLINE double combine_measures(const cuda::Decision& decision, std::uint32_t thread) {
  const auto* measures = at_address<const double>(decision.measures);
  double measured = 0.0;
  for (std::uint32_t i = thread; i < decision.count; i += cuda::kThreads)
    measured = combined(decision.what, measured, measures[i]);
  return measured;
}

// Combines a thread's measure with that of the thread `distance` later. After distances of 128, 64, ..., 1, the first
// thread's measure is the block's.
ONEPASS_INLINE void combine_pair(Measure what, double* measures, std::uint32_t thread, std::uint32_t distance) {
  if (thread < distance) measures[thread] = combined(what, measures[thread], measures[thread + distance]);
}

// Finds out how the step depends on what was measured of all gradients. One thread does this.
ONEPASS_INLINE void decide(const cuda::Decision& decision, double measured) {
  const double factor = magnitude(decision.grad_factor * unscaling(decision.grad_scale));
  const NormLimits limits{.max_norm = decision.max_norm, .skips_nonfinite = decision.skips_nonfinite};
  const Clipping clipping = clipping_for(limits, factor * norm_of(decision.what, measured));
  const double skips_by_norm = clipping.skips ? cuda::kSkippedByNorm : 0.0;
  *at_address<cuda::DeviceClipping>(decision.clipping) = {
      .norm = clipping.norm,
      .coefficient = clipping.coefficient,
      .skips = has_found_inf(decision.found_inf) ? cuda::kSkippedByScaler : skips_by_norm};
}

}  // namespace onepass::inline ONEPASS_TARGET
