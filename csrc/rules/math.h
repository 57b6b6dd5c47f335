// The few functions that rules need beside arithmetic. The standard library's are templates and inline functions that
// the linker could merge across instruction sets (see target.h), so rules use these.
#pragma once

#include "target.h"

namespace onepass::inline ONEPASS_TARGET {

ONEPASS_INLINE float square_root(float x) { return __builtin_sqrtf(x); }
ONEPASS_INLINE double square_root(double x) { return __builtin_sqrt(x); }

// The larger of the two, NaN where either is (torch.maximum).
template <class T>
ONEPASS_INLINE T maximum(T a, T b) {
  return (a > b || a != a) ? a : b;
}

// -1, 0 or 1; NaN stays NaN, so that a broken run shows.
template <class T>
ONEPASS_INLINE T sign(T x) {
  return x > T(0) ? T(1) : (x < T(0) ? T(-1) : x);
}

}  // namespace onepass::inline ONEPASS_TARGET
