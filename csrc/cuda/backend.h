// What the core asks of the module with the kernels: a table of functions, so that neither is linked to the other, and
// so that the tests can put an imitation on the CPU in its place.
#pragma once

#include <cstddef>

#include "cuda/table.h"
#include "rules/registry.h"

namespace onepass::cuda {

enum class Work : int {
  prepare,  // a counter of the table by each thread
  step,     // a chunk of the table by each block
};

// What depends on a device is about the calling thread's current one, which torch has set.
struct Backend {
  const char* built;  // with what compiler, and for which devices
  // Why its kernels cannot run; null if they can.
  const char* (*unusable)();
  int (*multiprocessors)(int device);
  // Puts the work of a table on a stream. Null, or what went wrong.
  const char* (*launch)(Work work, RuleId rule, bool wide, const LargeTable& table, void* stream);
};

// The bytes of a table that are in use, and so have to travel.
inline std::size_t size_of(const LargeTable& table) {
  return sizeof(Header) + table.header.words * sizeof(std::uint64_t);
}

}  // namespace onepass::cuda
