// Vectors of float32, converted from and to storage formats in registers.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "formats/with_format.h"
#include "target.h"

#if defined(__F16C__)
#include <immintrin.h>
#endif

namespace onepass::inline ONEPASS_TARGET {

// As many as a register of this instruction set holds.
#if defined(__AVX512F__)
inline constexpr std::int64_t kVectorWidth = 16;
#elif defined(__AVX2__)
inline constexpr std::int64_t kVectorWidth = 8;
#else
inline constexpr std::int64_t kVectorWidth = 4;
#endif
using FloatVector [[gnu::vector_size(kVectorWidth * 4)]] = float;
using BitVector [[gnu::vector_size(kVectorWidth * 4)]] = std::uint32_t;
using HalfVector [[gnu::vector_size(kVectorWidth * 2)]] = std::uint16_t;

// Whether this instruction set converts a format in registers.
template <class Codec>
inline constexpr bool kConvertsInRegisters = std::is_same_v<Codec, Float32> || std::is_same_v<Codec, BFloat16>;
#if defined(__F16C__)
template <>
inline constexpr bool kConvertsInRegisters<Float16> = true;
#endif

#if defined(__AVX512F__)
inline constexpr __mmask16 kAll = 0xffff;  // gcc 12 warns of its own header without a mask, and drops this one
#endif

ONEPASS_INLINE FloatVector load_vector(Float32, const std::byte* from) {
  FloatVector values;
  std::memcpy(&values, from, sizeof values);
  return values;
}

ONEPASS_INLINE void store_vector(Float32, std::byte* to, FloatVector values) {
  std::memcpy(to, &values, sizeof values);
}

ONEPASS_INLINE HalfVector load_halves(const std::byte* from) {
  HalfVector halves;
  std::memcpy(&halves, from, sizeof halves);
  return halves;
}

ONEPASS_INLINE void store_halves(std::byte* to, HalfVector halves) { std::memcpy(to, &halves, sizeof halves); }

// gcc 12 takes a register in halves for __builtin_convertvector.
ONEPASS_INLINE BitVector widened(HalfVector halves) {
#if defined(__AVX512F__)
  return std::bit_cast<BitVector>(_mm512_maskz_cvtepu16_epi32(kAll, std::bit_cast<__m256i>(halves)));
#elif defined(__AVX2__)
  return std::bit_cast<BitVector>(_mm256_cvtepu16_epi32(std::bit_cast<__m128i>(halves)));
#else
  return __builtin_convertvector(halves, BitVector);
#endif
}

ONEPASS_INLINE HalfVector narrowed(BitVector bits) {
#if defined(__AVX512F__)
  return std::bit_cast<HalfVector>(_mm512_maskz_cvtepi32_epi16(kAll, std::bit_cast<__m512i>(bits)));
#elif defined(__AVX2__)
  const auto words = std::bit_cast<__m256i>(bits);
  const __m256i halves = _mm256_permute4x64_epi64(_mm256_packus_epi32(words, words), 0b1000);
  return std::bit_cast<HalfVector>(_mm256_castsi256_si128(halves));
#else
  return __builtin_convertvector(bits, HalfVector);
#endif
}

ONEPASS_INLINE FloatVector load_vector(BFloat16, const std::byte* from) {
  return std::bit_cast<FloatVector>(widened(load_halves(from)) << 16);
}

ONEPASS_INLINE void store_vector(BFloat16, std::byte* to, FloatVector values) {
#if defined(__AVX512BF16__)
  store_halves(to, std::bit_cast<HalfVector>(_mm512_cvtneps_pbh(values)));
#else
  const auto bits = std::bit_cast<BitVector>(values);
  const BitVector rounded = (bits + 0x7fffU + ((bits >> 16) & 1U)) >> 16;
  const BitVector nan = (bits >> 16) | 0x40U;
  store_halves(to, narrowed((bits & 0x7fffffffU) > 0x7f800000U ? nan : rounded));
#endif
}

// The processor's own conversion: a tenth of the instructions of Float16's codec, and the same bits. It rounds to
// nearest even, keeps the sign and upper payload of a NaN and makes it quiet. float16's denormals survive in every
// mode.
#if defined(__F16C__)
ONEPASS_INLINE FloatVector load_vector(Float16, const std::byte* from) {
#if defined(__AVX512F__)
  return _mm512_maskz_cvtph_ps(kAll, std::bit_cast<__m256i>(load_halves(from)));
#else
  return _mm256_cvtph_ps(std::bit_cast<__m128i>(load_halves(from)));
#endif
}

ONEPASS_INLINE void store_vector(Float16, std::byte* to, FloatVector values) {
  constexpr int nearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
#if defined(__AVX512F__)
  store_halves(to, std::bit_cast<HalfVector>(_mm512_maskz_cvtps_ph(kAll, values, nearest)));
#else
  store_halves(to, std::bit_cast<HalfVector>(_mm256_cvtps_ph(values, nearest)));
#endif
}
#endif

}  // namespace onepass::inline ONEPASS_TARGET
