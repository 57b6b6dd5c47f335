// IEEE 754 binary64.
#pragma once

#include "target.h"

namespace onepass::inline ONEPASS_TARGET {

struct Float64 {
  using Storage = double;
  static constexpr int kSignificantBits = 53;
  template <class T>
  ONEPASS_INLINE static T decode(Storage value) {
    return static_cast<T>(value);
  }
  template <class T>
  ONEPASS_INLINE static Storage encode(T value) {
    return static_cast<Storage>(value);
  }
};

}  // namespace onepass::inline ONEPASS_TARGET
