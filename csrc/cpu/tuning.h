// Constants that make one processor faster and another slower. They change times only, never bits.
#pragma once

#include <cstdint>
#include <span>
#include <string_view>

namespace onepass {

struct Tuning {
  const char* name;
  bool (*fits)();  // whether it applies to this processor
  // Prefetch distances of the element-wise driver; 0: no prefetch.
  std::int64_t bytes_ahead;  // in plain arrays and 16-bit formats in registers, in bytes of the arithmetic type
  std::int64_t tiles_ahead;  // in tiles and blocks
};

// Returns all tunings, in order of preference. The last one fits every processor.
std::span<const Tuning> tunings();

// Returns the tuning of this name, or the first that fits this processor if the name is empty. Throws
// std::invalid_argument for an unknown name; the message lists all.
const Tuning& choose_tuning(std::string_view name);

// Returns the tuning in use. It is chosen at the first call, by choose_tuning(ONEPASS_TUNING).
const Tuning& active_tuning();

// Replaces the tuning in use by choose_tuning(name). For tests and benchmarks.
void force_tuning(std::string_view name);

}  // namespace onepass
