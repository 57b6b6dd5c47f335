// Sets of a rule's states: an unsigned with a bit for each state, in the order of the rule's `state_names`.
#pragma once

#include <array>
#include <cstddef>
#include <string_view>

#include "target.h"

namespace onepass::inline ONEPASS_TARGET {

// Returns the set of one state. A name that the rule does not have is a compile error, because `at` then throws.
template <std::size_t Count>
consteval unsigned state_bit(const std::array<const char*, Count>& state_names, std::string_view name) {
  std::size_t s = 0;
  while (state_names.at(s) != name) ++s;
  return 1U << s;
}

// Returns the set of all states.
template <std::size_t Count>
consteval unsigned all_states(const std::array<const char*, Count>& /*state_names*/) {
  return (1U << Count) - 1U;
}

}  // namespace onepass::inline ONEPASS_TARGET
