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

// The running average (1 - gain) * old + gain * x. `keep` is 1 - gain, rounded on its own.
//
// Multiplying `old` by a rounded `keep` every time would put keep's rounding error into the average 1 / gain times
// over: Adam's second moment (0.999 in float32) would end 1.3e-5 off. The interpolation has no such error. From the
// nearer end, as torch.lerp does it, or a large gain would drown a small x in the rounding of a large `old`.
template <class T>
ONEPASS_INLINE T average(T old, T x, T gain, T keep) {
  const T difference = x - old;
  return gain < T(0.5) ? old + gain * difference : x - keep * difference;
}

}  // namespace onepass::inline ONEPASS_TARGET
