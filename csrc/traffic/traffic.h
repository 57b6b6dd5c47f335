// The limit of the benchmarks: several plain loops that read and write the arrays of a step, with additions only. The
// fastest of them on a machine is its limit. They share neither code nor constants with the kernels.
#pragma once

#include <cstdint>
#include <span>
#include <string_view>
#include <vector>

namespace onepass {

// The arrays of one tensor's step, each of `length` floats. Those in `measured` are read in a pass before it, as by
// rules that need sums over the tensor.
struct Traffic {
  std::int64_t length = 0;
  const float* read = nullptr;
  std::vector<float*> updated;
  std::vector<const float*> measured;
};

inline constexpr std::size_t kMaxUpdated = 6;

// A loop over i in [begin, end): `add` computes updated[k][i] += read[i] for all k, `sum` the sum of all
// measured[k][i].
struct Loop {
  const char* name;
  void (*add)(const Traffic& tensor, std::int64_t begin, std::int64_t end);
  float (*sum)(const Traffic& tensor, std::int64_t begin, std::int64_t end);
};

std::span<const Loop> loops();

// Returns the loop of this name. Throws std::invalid_argument for an unknown name; the message lists all.
const Loop& find_loop(std::string_view name);

// Runs a loop over tensors of 1 to kMaxUpdated updated arrays, and before that over the measured ones, of which a
// tensor has up to kMaxUpdated, too. Each thread gets an equal range of the elements. Returns the sum of what was
// measured.
float move_traffic(const Loop& loop, std::span<const Traffic> tensors, int threads);

}  // namespace onepass
