// The interface between the core and the module with the kernels: a table of functions. Neither is linked to the other,
// and the tests can replace the kernels by an imitation on the CPU.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>

#include "cuda/table.h"
#include "rules/all.h"
#include "rules/registry.h"

namespace onepass::cuda {

// Returns a hash (FNV-1a) of the rules, in order, and of the sizes of what tables and rules hold. The core and the
// kernels must have the same: a rule is passed by its number, and constants as bytes.
constexpr std::uint64_t fingerprint() {
  std::uint64_t hash = 0xcbf29ce484222325U;
  const auto add = [&](std::uint64_t value) { hash = (hash ^ value) * 0x100000001b3U; };
  for (const std::size_t size : {sizeof(Header), sizeof(Row), sizeof(Counter), sizeof(Decision), sizeof(SmallTable),
                                 sizeof(StochasticWords), sizeof(SumWords)})
    add(size);
  const auto add_rule = [&](std::string_view name, std::size_t constants) {
    for (const char letter : name) add(static_cast<unsigned char>(letter));
    add(constants);
  };
#define ONEPASS_X(name, Type) add_rule(#name, sizeof(Type::Constants<float>) + sizeof(Type::Constants<double>));
  ONEPASS_RULES(ONEPASS_X)
#undef ONEPASS_X
  return hash;
}

enum class Work : int {
  prepare,          // each thread runs a counter of the table
  step,             // each block steps a chunk of a row
  step_stochastic,  // the same for rows that are rounded with random bits
  sum,              // each block sums a chunk of a row
  total,            // each block adds up and writes the sums of a row
  complete,         // each block adds up the sums of a row, and completes its constants with them
  // Each block measures a chunk of a row whose only operand is a gradient:
  sum_of_squares,
  largest_magnitude,
};

// Functions without an argument `device` use the calling thread's current device, which torch has set.
struct Backend {
  std::uint64_t fingerprint;  // of the build
  const char* built;          // the compiler and the devices of the kernels
  // Returns why the kernels cannot run; null if they can. Throws std::runtime_error for an error that may pass, such as
  // lack of memory.
  const char* (*unusable)();
  int (*multiprocessors)(int device);
  // Launches the work of a table on a stream. Returns null, or the error. The rule does not matter for measures.
  const char* (*launch)(Work work, RuleId rule, bool wide, const LargeTable& table, void* stream);
  // Launches the kernel that computes a DeviceClipping on a stream. Returns null, or the error.
  const char* (*decide)(const Decision& decision, void* stream);
};

// Returns the bytes of a table that are in use.
inline std::size_t size_of(const LargeTable& table) {
  return sizeof(Header) + table.header.words * sizeof(std::uint64_t);
}

// Returns how many blocks do the work of a table.
inline std::uint32_t blocks_of(Work work, const LargeTable& table) {
  switch (work) {
    case Work::prepare:
      return (table.header.rows + kThreads - 1) / kThreads;
    case Work::total:
    case Work::complete:
      return table.header.rows;
    default:
      return table.header.blocks;
  }
}

}  // namespace onepass::cuda
