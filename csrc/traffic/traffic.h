// The limit of the benchmarks: several plain loops that read and write the arrays of a step, with additions only. The
// fastest of them on a machine is its limit. They share neither code nor constants with the kernels.
#pragma once

#include <cstdint>
#include <span>
#include <string_view>
#include <vector>

namespace onepass {

// The arrays of one tensor's step, each of `length` floats.
struct Traffic {
  std::int64_t length = 0;
  const float* read = nullptr;
  std::vector<float*> updated;
};

inline constexpr std::size_t kMaxUpdated = 6;

// A loop that computes updated[k][i] += read[i] for all k, and i in [begin, end).
struct Loop {
  const char* name;
  void (*add)(const Traffic& tensor, std::int64_t begin, std::int64_t end);
};

std::span<const Loop> loops();

// Returns the loop of this name. Throws std::invalid_argument for an unknown name; the message lists all.
const Loop& find_loop(std::string_view name);

// Runs a loop over tensors of 1 to kMaxUpdated updated arrays. Each thread gets an equal range of the elements.
void move_traffic(const Loop& loop, std::span<const Traffic> tensors, int threads);

}  // namespace onepass
