// The yardstick of the benchmarks: the same arrays read and written, with additions only.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace onepass {

// The arrays of one tensor's step, each of `length` floats.
struct Traffic {
  std::int64_t length = 0;
  const float* read = nullptr;
  std::vector<float*> updated;
};

// updated[k][i] += read[i] for all k and i, divided over the threads as a step is. At most six updated arrays.
void move_traffic(std::span<const Traffic> tensors, int threads);

}  // namespace onepass
