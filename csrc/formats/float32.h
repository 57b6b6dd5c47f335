// IEEE 754 binary32.
#pragma once

#include "target.h"

namespace onepass::inline ONEPASS_TARGET {

struct Float32 {
  using Storage = float;
  static constexpr int kSignificantBits = 24;
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
