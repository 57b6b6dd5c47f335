// The low 16 bits of a float32 number whose high 16 bits are those of a bfloat16 number, rounded to nearest with ties
// away from zero (see cpu/master.h).
#pragma once

#include <bit>
#include <cstdint>

#include "target.h"

namespace onepass::inline ONEPASS_TARGET {

ONEPASS_INLINE bool is_nan(std::uint32_t bits) { return (bits & 0x7fffffffU) > 0x7f800000U; }

// Whether two float32 numbers have the same bits or are both NaN.
ONEPASS_INLINE bool is_copy(float a, float b) {
  const auto x = std::bit_cast<std::uint32_t>(a);
  const auto y = std::bit_cast<std::uint32_t>(b);
  return x == y || (is_nan(x) && is_nan(y));
}

struct LowBits {
  // Returns the bfloat16 number: half a unit of its last place is added, and the rest cut off.
  ONEPASS_INLINE static std::uint16_t high_of(float master) {
    const auto bits = std::bit_cast<std::uint32_t>(master);
    return static_cast<std::uint16_t>(is_nan(bits) ? (bits >> 16) | 0x40U : (bits + 0x8000U) >> 16);
  }

  ONEPASS_INLINE static std::uint16_t low_of(float master) {
    const auto bits = std::bit_cast<std::uint32_t>(master);
    return static_cast<std::uint16_t>(is_nan(bits) ? 0U : bits);
  }

  // Returns the master. `high` has the value of the bfloat16 number. Beside a zero, negative low bits are of a number
  // that the zero has replaced unnoticed: they would make it NaN.
  ONEPASS_INLINE static float join(float high, std::uint16_t low) {
    const auto bits = std::bit_cast<std::uint32_t>(high);
    const std::uint32_t sign = low & 0x8000U;
    const bool replaced = (bits << 1) == 0 && sign != 0;
    return std::bit_cast<float>(replaced ? bits : bits + low - (sign << 1));
  }
};

}  // namespace onepass::inline ONEPASS_TARGET
