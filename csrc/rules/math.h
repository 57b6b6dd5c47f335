// The functions that rules use. The standard library's are templates and inline functions, which the linker could merge
// across instruction sets (see target.h).
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <type_traits>

#include "target.h"

namespace onepass::inline ONEPASS_TARGET {

ONEPASS_INLINE float square_root(float x) { return __builtin_sqrtf(x); }
ONEPASS_INLINE double square_root(double x) { return __builtin_sqrt(x); }

// A bool that is constant during a step, as a mask of bits. `flag ? a : b` in a loop is a branch that the compiler has
// to move out of the loop. It does so for two or three of them, and does not vectorize a loop with more. A mask is
// arithmetic.
template <class T>
class Flag {
 public:
  ONEPASS_INLINE explicit Flag(bool yes) : mask_(yes ? ~Bits{0} : Bits{0}) {}

  // Whether the sign bits of two numbers are the same. Zeros have signs, too.
  ONEPASS_INLINE static Flag same_sign(T a, T b) {
    constexpr int kSignBit = 8 * sizeof(T) - 1;
    Flag same(false);
    same.mask_ = ((std::bit_cast<Bits>(a) ^ std::bit_cast<Bits>(b)) >> kSignBit) - 1U;
    return same;
  }

  ONEPASS_INLINE bool is_set() const { return mask_ != 0; }

  ONEPASS_INLINE friend Flag operator&(Flag a, Flag b) {
    a.mask_ &= b.mask_;
    return a;
  }

  ONEPASS_INLINE friend Flag operator|(Flag a, Flag b) {
    a.mask_ |= b.mask_;
    return a;
  }

  // Returns yes if the flag is set, else no.
  ONEPASS_INLINE friend T select(Flag flag, T yes, T no) {
    const Bits other = std::bit_cast<Bits>(no);
    return std::bit_cast<T>(other ^ ((other ^ std::bit_cast<Bits>(yes)) & flag.mask_));
  }

  // Returns x if the flag is set, else zero, also where x is NaN or infinite. A single instruction, so better than
  // `select` for a term that an option adds.
  ONEPASS_INLINE friend T only_if(Flag flag, T x) { return std::bit_cast<T>(std::bit_cast<Bits>(x) & flag.mask_); }

 private:
  using Bits = std::conditional_t<sizeof(T) == 4, std::uint32_t, std::uint64_t>;
  Bits mask_;
};

// Returns yes or no by a condition on an element, as a mask of bits. For several conditions that depend on each other,
// compilers would make branches, and turn these into dozens of mask instructions.
template <class T>
ONEPASS_INLINE T choose(bool condition, T yes, T no) {
  return select(Flag<T>(condition), yes, no);
}

// Returns the larger of the two, and NaN if either is NaN (as torch.maximum).
template <class T>
ONEPASS_INLINE T maximum(T a, T b) {
  return (a > b || a != a) ? a : b;  // NOLINT(misc-redundant-expression): a != a is true for NaN
}

ONEPASS_INLINE float magnitude(float x) { return __builtin_fabsf(x); }
ONEPASS_INLINE double magnitude(double x) { return __builtin_fabs(x); }

// A product in double, in which those of float32 values are exact and cannot overflow.
template <class T>
struct Product {
  T a, b;
  ONEPASS_INLINE explicit operator double() const { return double{a} * double{b}; }
};

template <class T>
ONEPASS_INLINE Product<T> squared(T x) {
  return {x, x};
}

// Returns the sum. Where a product is exact, a fused multiply-add has the bits of a product and a sum, in one
// operation.
template <class T>
ONEPASS_INLINE double plus(double sum, Product<T> product) {
#if defined(__FMA__) || defined(__AVX512F__) || defined(__ARM_FEATURE_FMA)
  if constexpr (sizeof(T) == 4) return __builtin_fma(double{product.a}, double{product.b}, sum);
#endif
  return sum + static_cast<double>(product);
}

template <class T>
ONEPASS_INLINE T plus(T sum, T x) {
  return sum + x;
}

// Returns x, limited to [-limit, limit]. NaN stays NaN.
template <class T>
ONEPASS_INLINE T clamped(T x, T limit) {
  const T above = x < -limit ? -limit : x;
  return above > limit ? limit : above;
}

// Returns x, or the largest finite number of its sign if x is infinite. NaN stays NaN.
template <class T>
ONEPASS_INLINE T finite(T x) {
  return clamped(x, sizeof(T) == 4 ? T(0x1.fffffep127) : T(0x1.fffffffffffffp1023));
}

ONEPASS_INLINE float with_sign_of(float sign, float x) { return __builtin_copysignf(x, sign); }
ONEPASS_INLINE double with_sign_of(double sign, double x) { return __builtin_copysign(x, sign); }

// Returns -1, 0 or 1. NaN stays NaN, so that an invalid gradient is visible in the parameter.
template <class T>
ONEPASS_INLINE T sign(T x) {
  return choose(magnitude(x) > T(0), with_sign_of(x, T(1)), x);
}

// Running sums and averages. If beta were rounded to float32, every step would add its rounding error, 1 / (1 - beta)
// times in all: an error of 1.3e-5 in Adam's second moment (beta 0.999). These avoid it.

// beta * old + x. Beta is held as the sum of two numbers of one sign, neither of them zero, so an infinite sum stays
// infinite.
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

// beta * old + (1 - beta) * x, as an interpolation from the nearer end (as torch.lerp). From the other end, a small x
// would be lost in the rounding of a large `old`.
template <class T>
class Average {
 public:
  ONEPASS_SETUP explicit Average(double beta) : Average(beta, 1.0 - beta) {}

  // `gain` is 1 - beta, for callers that know it more exactly than the difference is.
  ONEPASS_SETUP Average(double beta, double gain) : from_new_(beta <= 0.5), weight_(beta <= 0.5 ? T(-beta) : T(gain)) {}

  ONEPASS_INLINE T operator()(T old, T x) const { return select(from_new_, x, old) + weight_ * (x - old); }

 private:
  Flag<T> from_new_;
  T weight_;
};

// beta * old + (1 - beta) * x^2. Its terms have one sign, so it needs no interpolation. An interpolation would turn an
// average that a huge gradient has made infinite into NaN. Here it stays infinite, as in torch, and the parameter does
// not change.
template <class T>
class AverageOfSquares {
 public:
  ONEPASS_SETUP explicit AverageOfSquares(double beta) : AverageOfSquares(beta, 1.0 - beta) {}

  // As for Average.
  ONEPASS_SETUP AverageOfSquares(double beta, double gain) : sum_(beta), gain_(T(gain)) {}

  ONEPASS_INLINE T operator()(T old, T x) const { return sum_(old, gain_ * x * x); }

 private:
  RunningSum<T> sum_;
  T gain_;
};

}  // namespace onepass::inline ONEPASS_TARGET
