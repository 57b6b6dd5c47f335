// The few functions that rules need beside arithmetic. The standard library's are templates and inline functions that
// the linker could merge across instruction sets (see target.h), so rules use these.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <type_traits>

#include "target.h"

namespace onepass::inline ONEPASS_TARGET {

ONEPASS_INLINE float square_root(float x) { return __builtin_sqrtf(x); }
ONEPASS_INLINE double square_root(double x) { return __builtin_sqrt(x); }

// A yes or no that holds for a whole step, as a mask of bits. `flag ? a : b` in a loop is a branch that the compiler
// has to move out of it, which it does for two or three of them and then gives up vectorising; a mask is arithmetic.
template <class T>
class Flag {
 public:
  ONEPASS_INLINE explicit Flag(bool yes) : mask_(yes ? ~Bits{0} : Bits{0}) {}

  // yes or no.
  ONEPASS_INLINE friend T select(Flag flag, T yes, T no) {
    const Bits other = std::bit_cast<Bits>(no);
    return std::bit_cast<T>(other ^ ((other ^ std::bit_cast<Bits>(yes)) & flag.mask_));
  }

  // x or zero, whatever x is: a single instruction, so the better choice for a term that an option adds.
  ONEPASS_INLINE friend T only_if(Flag flag, T x) { return std::bit_cast<T>(std::bit_cast<Bits>(x) & flag.mask_); }

 private:
  using Bits = std::conditional_t<sizeof(T) == 4, std::uint32_t, std::uint64_t>;
  Bits mask_;
};

// yes or no for a condition on an element, as a mask of bits: of several conditions that depend on each other,
// compilers make branches, and masks of those.
template <class T>
ONEPASS_INLINE T choose(bool condition, T yes, T no) {
  return select(Flag<T>(condition), yes, no);
}

// The larger of the two, NaN where either is (torch.maximum).
template <class T>
ONEPASS_INLINE T maximum(T a, T b) {
  return (a > b || a != a) ? a : b;
}

ONEPASS_INLINE float magnitude(float x) { return __builtin_fabsf(x); }
ONEPASS_INLINE double magnitude(double x) { return __builtin_fabs(x); }

// x, but the largest finite number where it is infinite. NaN stays NaN.
template <class T>
ONEPASS_INLINE T finite(T x) {
  constexpr T largest = sizeof(T) == 4 ? T(0x1.fffffep127) : T(0x1.fffffffffffffp1023);
  const T above = x < -largest ? -largest : x;
  return above > largest ? largest : above;
}

ONEPASS_INLINE float with_sign_of(float sign, float x) { return __builtin_copysignf(x, sign); }
ONEPASS_INLINE double with_sign_of(double sign, double x) { return __builtin_copysign(x, sign); }

// -1, 0 or 1; NaN stays NaN, so that a broken run shows.
template <class T>
ONEPASS_INLINE T sign(T x) {
  return choose(magnitude(x) > T(0), with_sign_of(x, T(1)), x);
}

// Running sums and averages. Multiplying by a beta rounded to float32 at every step would put beta's rounding error
// into the sum 1 / (1 - beta) times over: Adam's second moment (0.999) would end 1.3e-5 off. None of these does.

// beta * old + x. Beta is held as a sum of two numbers of one sign, neither of them zero, so an infinite sum stays so.
template <class T>
class RunningSum {
 public:
  ONEPASS_SETUP explicit RunningSum(double beta) : most_(towards_zero(beta)), rest_(T(beta - double{most_})) {}

  ONEPASS_INLINE T operator()(T old, T x) const { return most_ * old + (rest_ * old + x); }

 private:
  ONEPASS_SETUP static T towards_zero(double beta) {
    const T rounded = T(beta);
    return std::fabs(double{rounded}) < std::fabs(beta) || beta == 0.0 ? rounded : std::nextafter(rounded, T(0));
  }

  T most_, rest_;
};

// beta * old + (1 - beta) * x, as an interpolation from the nearer end (torch.lerp): from the other, a large `old`
// would drown a small x in its rounding.
template <class T>
class Average {
 public:
  ONEPASS_SETUP explicit Average(double beta) : Average(beta, 1.0 - beta) {}

  // For a gain that is known better than its difference from 1.
  ONEPASS_SETUP Average(double beta, double gain) : from_new_(beta <= 0.5), weight_(beta <= 0.5 ? T(-beta) : T(gain)) {}

  ONEPASS_INLINE T operator()(T old, T x) const { return select(from_new_, x, old) + weight_ * (x - old); }

 private:
  Flag<T> from_new_;
  T weight_;
};

// beta * old + (1 - beta) * x^2. Its terms have one sign, so it needs no interpolation, which would make NaN of an
// average that a huge gradient has left infinite; here it stays infinite, as in torch, and the parameter stands still.
template <class T>
class AverageOfSquares {
 public:
  ONEPASS_SETUP explicit AverageOfSquares(double beta) : sum_(beta), gain_(T(1.0 - beta)) {}

  ONEPASS_INLINE T operator()(T old, T x) const { return sum_(old, gain_ * x * x); }

 private:
  RunningSum<T> sum_;
  T gain_;
};

}  // namespace onepass::inline ONEPASS_TARGET
