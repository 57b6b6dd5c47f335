// bfloat16: the upper half of a binary32. Encoding rounds to nearest, ties to even. A NaN keeps its sign and its upper
// payload and becomes quiet. float64 is rounded to float32 first, as in torch.
#pragma once

#include <bit>
#include <cstdint>

#include "target.h"

namespace onepass::inline ONEPASS_TARGET {

struct BFloat16 {
  using Storage = std::uint16_t;
  static constexpr int kSignificantBits = 8;

  template <class T>
  ONEPASS_INLINE static T decode(Storage value) {
    return static_cast<T>(std::bit_cast<float>(static_cast<std::uint32_t>(value) << 16));
  }

  template <class T>
  ONEPASS_INLINE static Storage encode(T value) {
    const auto bits = std::bit_cast<std::uint32_t>(static_cast<float>(value));
    const std::uint32_t rounded = (bits + 0x7fffU + ((bits >> 16) & 1U)) >> 16;
    const std::uint32_t nan = (bits >> 16) | 0x40U;
    return static_cast<Storage>((bits & 0x7fffffffU) > 0x7f800000U ? nan : rounded);
  }
};

}  // namespace onepass::inline ONEPASS_TARGET
