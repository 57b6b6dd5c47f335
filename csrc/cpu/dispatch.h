// The choice of the instruction set: the best that this machine has, or the one that ONEPASS_ISA names.
#pragma once

#include <span>
#include <string_view>

#include "cpu/kernels.h"

namespace onepass {

struct Isa {
  const char* name;
  bool (*supported)();  // by the processor and by the operating system
  Kernels kernels;
};

// Returns the instruction sets that were compiled, best first.
std::span<const Isa> compiled_isas();

// Returns the instruction set of this name, or the best one if the name is empty. Throws std::invalid_argument for a
// name that is unknown or not supported on this machine; the message lists those that are.
const Isa& choose_isa(std::string_view name);

// Returns the instruction set in use. It is chosen at the first call, by choose_isa(ONEPASS_ISA).
const Isa& active_isa();

// Replaces the instruction set in use by choose_isa(name). For tests and benchmarks.
void force_isa(std::string_view name);

}  // namespace onepass
