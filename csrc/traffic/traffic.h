// The limit of the benchmarks: several plain loops that read and write the arrays of a step, with additions only. They
// share no code and no choice with the kernels; the fastest of them on a machine is its limit.
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

// A way to compute updated[k][i] += read[i] for all k, and i in [begin, end).
struct Loop {
  const char* name;
  void (*add)(const Traffic& tensor, std::int64_t begin, std::int64_t end);
};

std::span<const Loop> loops();

// Throws std::invalid_argument, with a message that lists all, for an unknown name.
const Loop& find_loop(std::string_view name);

// Runs a loop over tensors of 1 to kMaxUpdated updated arrays. Elements are divided over the threads in equal ranges.
void move_traffic(const Loop& loop, std::span<const Traffic> tensors, int threads);

}  // namespace onepass
