// 8-bit states: microscaling blocks (OCP Microscaling Formats 1.0). Up to 32 elements share a scale, a power of two
// (E8M0: 2^(s - 127); 255 is NaN). Each element has an 8-bit code (E4M3: 4 bits of exponent, 3 of mantissa, at most
// 448). An element is scale * code, or its square if the state is an average of squares, which then needs half the
// range.
//
// The scale is the smallest with which no code exceeds 448. Codes are rounded stochastically: up with a probability
// that is the distance from the lower code. An average moves by less than half a code in a step, so rounding to nearest
// would never move it. Where a state may not become zero, because a step divides by it, its smallest code is 1 unless
// its value is zero. If an element is infinite, NaN, or larger than 448 * 2^118, the whole block becomes NaN.
//
// Only shifts, integer arithmetic and single operations of float32, so that every instruction set and a GPU give the
// same bits.
#pragma once

#include <bit>
#include <cstdint>

#include "formats/stochastic.h"
#include "rules/math.h"
#include "rules/registry.h"
#include "target.h"

namespace onepass::inline ONEPASS_TARGET {

// Returns x / 2 + y.
ONEPASS_INLINE float half_plus(float x, float y) { return x * 0.5F + y; }

ONEPASS_INLINE std::uint32_t smaller(std::uint32_t x, std::uint32_t y) { return x < y ? x : y; }

// The functions below are templates over a float and 32 bits, or a vector of each: what `?:` and the operators do to a
// vector, they do to each element.

// What is stored of a value: the value itself, or the root of an average of squares.
template <Coding coding, class Float>
ONEPASS_INLINE Float stored_value(Float value) {
  if constexpr (coding == Coding::squares) return square_root(value);
  return value;
}

// Returns the bits of the magnitude of a stored value. As integers they have the order of the magnitudes.
template <class Bits, class Float>
ONEPASS_INLINE Bits magnitude_of(Float value) {
  return std::bit_cast<Bits>(value) & 0x7fffffffU;
}

inline constexpr std::uint32_t kNanScale = 255;

// Returns the scale's code for blocks whose largest magnitude has these bits. 448 is 1.75 * 2^8: a larger mantissa
// needs the next power of two. The smallest scale has code 1, because 2^-127 is denormal in float32.
template <class Bits>
ONEPASS_INLINE Bits scale_for(Bits largest) {
  const Bits exponent = (largest + 0x1fffffU) >> 23;
  const Bits scale = exponent > 9U ? exponent - 8U : Bits{} + 1U;
  return exponent > 253U ? Bits{} + kNanScale : scale;
}

// Returns the factor of decoded codes: the scale * 2^8.
template <class Float, class Bits>
ONEPASS_INLINE Float decoding_factor(Bits scale) {
  return std::bit_cast<Float>(scale == kNanScale ? Bits{} + 0x7fc00000U : Bits((scale + 8U) << 23));
}

// Returns the factor of stored values that are encoded: 2^-8 / scale; 0 if the scale is NaN.
template <class Float, class Bits>
ONEPASS_INLINE Float encoding_factor(Bits scale) {
  return std::bit_cast<Float>(scale == kNanScale ? Bits{} : Bits((246U - scale) << 23));
}

// Returns the value of an E4M3 code, times 2^-8: so it has the bits of a float16 number, with zeros behind.
ONEPASS_INLINE float decode_e4m3(std::uint8_t code) {
  const std::uint32_t magnitude = code & 0x7fU;
  const std::uint32_t sign = static_cast<std::uint32_t>(code & 0x80U) << 24;
  // Exponent bias 7 + 8 becomes 127. A denormal m * 2^-17 is (1 + m/8) * 2^-14 less 2^-14, both normal in float32.
  const std::uint32_t normal = (magnitude << 20) + (112U << 23);
  const auto denormal = std::bit_cast<std::uint32_t>(std::bit_cast<float>((magnitude << 20) + (113U << 23)) - 0x1p-14F);
  return std::bit_cast<float>((magnitude < 8U ? denormal : normal) | sign);
}

// A code is made in the bits of a float32 number, from this bit on; its sign is bit 7.
inline constexpr int kCodeShift = 20;
inline constexpr std::uint32_t kSignOfCode = 1U << (kCodeShift + 7);

// Rounds magnitudes, times 2^-8, stochastically to E4M3 codes. Returns the codes without signs, from kCodeShift on. The
// bits above are not defined.
template <class Float, class Bits>
ONEPASS_INLINE Bits encode_e4m3(Bits magnitude, Bits random) {
  // Below 2^-14 codes are multiples of 2^-17. With 2^-14 added, they differ in the same bit as the codes above, and the
  // half of the sum has the exponent of code 0. Above 2^-14 the magnitude itself is larger than this half.
  const Bits raised = std::bit_cast<Bits>(half_plus(std::bit_cast<Float>(magnitude), 0x1p-15F));
  const Bits aligned = raised > magnitude ? raised : magnitude;
  return aligned + (random >> 12);
}

// Returns the value of a decoded code, scaled.
template <Coding coding, class Float>
ONEPASS_INLINE Float state_value(Float decoded, float factor) {
  const Float stored = decoded * factor;
  if constexpr (coding == Coding::squares) return stored * stored;
  return stored;
}

// Returns the codes of stored values, from kCodeShift on; for signed values, the bits above are not defined.
template <Coding coding, class Bits, class Float>
ONEPASS_INLINE Bits encode_state(Float stored, float factor, Bits random) {
  const Bits scaled = std::bit_cast<Bits>(stored * factor);
  if constexpr (coding == Coding::signed_values) {
    const Bits code = encode_e4m3<Float>(Bits(scaled & 0x7fffffffU), random);
    return code ^ ((code ^ (scaled >> 4)) & kSignOfCode);
  } else {
    const Bits code = encode_e4m3<Float>(scaled, random) & (kSignOfCode - 1U);
    const Bits smallest = smaller(scaled, 1U << kCodeShift);  // code 1 unless the value is zero
    return code > smallest ? code : smallest;
  }
}

// Returns the byte of a code that encode_state returned.
ONEPASS_INLINE std::uint8_t code_of(std::uint32_t encoded) { return static_cast<std::uint8_t>(encoded >> kCodeShift); }

}  // namespace onepass::inline ONEPASS_TARGET
