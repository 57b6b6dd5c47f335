// Constants that one processor gains from and another loses by. They change times only, never bits.
#pragma once

#include <cstdint>
#include <span>
#include <string_view>

namespace onepass {

struct Tuning {
  const char* name;
  bool (*fits)();            // whether it is for this processor
  std::int64_t tiles_ahead;  // prefetch distance of the element-wise driver; 0: no prefetch
};

// All of them, in order of preference. The last one fits every processor.
std::span<const Tuning> tunings();

// The one of this name, or the first that fits this processor if the name is empty. Throws std::invalid_argument, with
// a message that lists all, for an unknown name.
const Tuning& choose_tuning(std::string_view name);

// The one in use. Chosen at the first call, by choose_tuning(ONEPASS_TUNING).
const Tuning& active_tuning();

// Replaces the one in use, as choose_tuning finds it. For tests and benchmarks.
void force_tuning(std::string_view name);

}  // namespace onepass
