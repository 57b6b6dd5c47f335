// Which instruction set runs: the best that this machine has, or the one that ONEPASS_ISA names.
#pragma once

#include <span>
#include <string_view>

#include "cpu/kernels.h"

namespace onepass {

struct Isa {
  const char* name;
  bool (*supported)();  // by the processor, and its registers by the operating system
  const Kernels* kernels;
};

// Those that were compiled, best first.
std::span<const Isa> compiled_isas();

// The one of this name, or the best one if the name is empty. Throws std::invalid_argument, with a message that lists
// what this machine has, for a name that is unknown or not supported here.
const Isa& choose_isa(std::string_view name);

// The one in use. Chosen at the first call, by choose_isa(ONEPASS_ISA).
const Isa& active_isa();

// Replaces the one in use, as choose_isa finds it. For tests and benchmarks.
void force_isa(std::string_view name);

}  // namespace onepass
