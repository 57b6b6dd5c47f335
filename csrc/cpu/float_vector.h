// A register of float32, converted from and to storage formats without a copy in memory. With AVX2 and AVX-512 only:
// with SSE2, four elements at a time, it takes 1.2 to 1.4 times as long as loops over tiles.
#pragma once

#include "formats/with_format.h"
#include "target.h"

#if defined(__AVX2__) && defined(__F16C__)
#define ONEPASS_FLOAT_VECTOR

#include <immintrin.h>

#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <utility>

namespace onepass::inline ONEPASS_TARGET {

#if defined(__AVX512F__)
inline constexpr std::int64_t kVectorWidth = 16;
inline constexpr __mmask16 kAll = 0xffff;  // without a mask gcc 12 warns about its own header; it drops this one
#else
inline constexpr std::int64_t kVectorWidth = 8;
#endif
using FloatVector [[gnu::vector_size(kVectorWidth * 4)]] = float;
using BitVector [[gnu::vector_size(kVectorWidth * 4)]] = std::uint32_t;
using HalfVector [[gnu::vector_size(kVectorWidth * 2)]] = std::uint16_t;

template <class Vector>
ONEPASS_INLINE Vector load_bytes(const std::byte* from) {
  Vector vector;
  std::memcpy(&vector, from, sizeof vector);
  return vector;
}

template <class Vector>
ONEPASS_INLINE void store_bytes(std::byte* to, Vector vector) {
  std::memcpy(to, &vector, sizeof vector);
}

// Not __builtin_convertvector, which gcc 12 splits into several instructions.
ONEPASS_INLINE BitVector widened(HalfVector halves) {
#if defined(__AVX512F__)
  return std::bit_cast<BitVector>(_mm512_maskz_cvtepu16_epi32(kAll, std::bit_cast<__m256i>(halves)));
#else
  return std::bit_cast<BitVector>(_mm256_cvtepu16_epi32(std::bit_cast<__m128i>(halves)));
#endif
}

ONEPASS_INLINE HalfVector upper_halves(BitVector bits) {
#if defined(__AVX512F__)
  return std::bit_cast<HalfVector>(_mm512_maskz_cvtepi32_epi16(kAll, std::bit_cast<__m512i>(bits >> 16)));
#else
  const auto words = std::bit_cast<__m256i>(bits >> 16);
  const __m256i halves = _mm256_permute4x64_epi64(_mm256_packus_epi32(words, words), 0b1000);
  return std::bit_cast<HalfVector>(_mm256_castsi256_si128(halves));
#endif
}

// All conversions have the bits of the codecs (formats/). The processor's conversions round to nearest even, keep the
// sign and the upper payload of a NaN, and make it quiet. The one to bfloat16 treats float32 denormals, which a step
// does not have, as zero. Denormals of float16 are kept in every floating-point mode.

ONEPASS_INLINE FloatVector load_vector(Float32, const std::byte* from) { return load_bytes<FloatVector>(from); }
ONEPASS_INLINE void store_vector(Float32, std::byte* to, FloatVector values) { store_bytes(to, values); }

ONEPASS_INLINE FloatVector load_vector(BFloat16, const std::byte* from) {
  return std::bit_cast<FloatVector>(widened(load_bytes<HalfVector>(from)) << 16);
}

// Returns bits whose upper half is the value in bfloat16.
ONEPASS_INLINE BitVector rounded_to_bfloat16(FloatVector values) {
  const auto bits = std::bit_cast<BitVector>(values);
  return values != values ? bits | 0x400000U : bits + 0x7fffU + ((bits >> 16) & 1U);
}

ONEPASS_INLINE void store_vector(BFloat16, std::byte* to, FloatVector values) {
#if defined(__AVX512BF16__)
  store_bytes(to, _mm512_cvtneps_pbh(values));
#else
  store_bytes(to, upper_halves(rounded_to_bfloat16(values)));
#endif
}

ONEPASS_INLINE FloatVector load_vector(Float16, const std::byte* from) {
#if defined(__AVX512F__)
  return _mm512_maskz_cvtph_ps(kAll, load_bytes<__m256i>(from));
#else
  return _mm256_cvtph_ps(load_bytes<__m128i>(from));
#endif
}

ONEPASS_INLINE void store_vector(Float16, std::byte* to, FloatVector values) {
  constexpr int nearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
#if defined(__AVX512F__)
  store_bytes(to, _mm512_maskz_cvtps_ph(kAll, values, nearest));
#else
  store_bytes(to, _mm256_cvtps_ph(values, nearest));
#endif
}

// Two registers of consecutive elements: in their order, or in that of `Alternating`.
struct VectorPair {
  FloatVector first, second;
};

template <class Codec>
ONEPASS_INLINE VectorPair load_pair(Codec codec, const std::byte* from) {
  return {load_vector(codec, from), load_vector(codec, from + kVectorWidth * sizeof(typename Codec::Storage))};
}

template <class Codec>
ONEPASS_INLINE void store_pair(Codec codec, std::byte* to, VectorPair values) {
  store_vector(codec, to, values.first);
  store_vector(codec, to + kVectorWidth * sizeof(typename Codec::Storage), values.second);
}

// The halves of two registers of 32 bits.
using Halves [[gnu::vector_size(kVectorWidth * 4)]] = std::uint16_t;

// Return the lower or upper half of each element of two registers.
ONEPASS_INLINE Halves lower_halves(BitVector first, BitVector second) {
  return [&]<int... I>(std::integer_sequence<int, I...>) __attribute__((always_inline)) {
    return __builtin_shufflevector(std::bit_cast<Halves>(first), std::bit_cast<Halves>(second), (2 * I)...);
  }(std::make_integer_sequence<int, 2 * kVectorWidth>{});
}
ONEPASS_INLINE Halves upper_halves(BitVector first, BitVector second) {
  return [&]<int... I>(std::integer_sequence<int, I...>) __attribute__((always_inline)) {
    return __builtin_shufflevector(std::bit_cast<Halves>(first), std::bit_cast<Halves>(second), (2 * I + 1)...);
  }(std::make_integer_sequence<int, 2 * kVectorWidth>{});
}

// Returns two registers whose elements have these lower and upper halves.
ONEPASS_INLINE VectorPair joined(Halves lower, Halves upper) {
  constexpr int n = 2 * kVectorWidth;
  return [&]<int... I>(std::integer_sequence<int, I...>) __attribute__((always_inline)) {
    return VectorPair{
        std::bit_cast<FloatVector>(__builtin_shufflevector(lower, upper, (I / 2 + I % 2 * n)...)),
        std::bit_cast<FloatVector>(__builtin_shufflevector(lower, upper, (I / 2 + I % 2 * n + n / 2)...))};
  }(std::make_integer_sequence<int, n>{});
}

// Return and store masters, of which the parameter has the high bits (LowBits, formats/low_bits.h).
ONEPASS_INLINE VectorPair load_joined(const std::byte* high, const std::byte* low) {
  using SignedHalves [[gnu::vector_size(sizeof(Halves))]] = std::int16_t;
  const auto upper = load_bytes<Halves>(high);
  const auto lower = load_bytes<Halves>(low);
  const auto borrow = std::bit_cast<Halves>(std::bit_cast<SignedHalves>(lower) >> 15);  // -1 where it is negative
  const Halves kept = (upper << 1) == 0 ? ~borrow : Halves{} - 1;
  return joined(lower & kept, upper + (borrow & kept));
}

ONEPASS_INLINE void store_split(std::byte* high, std::byte* low, VectorPair masters) {
  const auto rounded = [](FloatVector own) {
    const auto bits = std::bit_cast<BitVector>(own);
    return own != own ? bits | 0x400000U : bits + 0x8000U;
  };
  const auto kept = [](FloatVector own) { return own != own ? BitVector{} : std::bit_cast<BitVector>(own); };
  store_bytes(high, upper_halves(rounded(masters.first), rounded(masters.second)));
  store_bytes(low, lower_halves(kept(masters.first), kept(masters.second)));
}

// With AVX2 these are no faster than one register at a time.
#if defined(__AVX512F__)
ONEPASS_INLINE VectorPair load_pair(BFloat16, const std::byte* from) {
  return joined(Halves{}, load_bytes<Halves>(from));
}

ONEPASS_INLINE void store_pair(BFloat16, std::byte* to, VectorPair values) {
#if defined(__AVX512BF16__)
  store_bytes(to, _mm512_cvtne2ps_pbh(values.second, values.first));
#else
  store_bytes(to, upper_halves(rounded_to_bfloat16(values.first), rounded_to_bfloat16(values.second)));
#endif
}
#endif

// bfloat16 in the order that needs the fewest instructions: elements 0, 2, 4, ... and elements 1, 3, 5, ...
struct Alternating {
  using Storage = BFloat16::Storage;
};

ONEPASS_INLINE VectorPair load_pair(Alternating, const std::byte* from) {
  const auto pairs = load_bytes<BitVector>(from);
  return {std::bit_cast<FloatVector>(pairs << 16), std::bit_cast<FloatVector>(pairs & 0xffff0000U)};
}

ONEPASS_INLINE void store_pair(Alternating, std::byte* to, VectorPair values) {
#if defined(__AVX512BF16__)
  alignas(64) static constexpr std::uint16_t order[] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                        8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const auto halves = std::bit_cast<__m512i>(_mm512_cvtne2ps_pbh(values.second, values.first));
  store_bytes(to, _mm512_maskz_permutexvar_epi16(0xffffffff, _mm512_load_si512(order), halves));
#else
  store_bytes(to, (rounded_to_bfloat16(values.first) >> 16) | (rounded_to_bfloat16(values.second) & 0xffff0000U));
#endif
}

// Returns the values of 8-bit codes, times 2^-8, as decode_e4m3 does for each (formats/microscaling.h). Shifted to
// float16's place, they are float16 numbers, which the processor converts.
ONEPASS_INLINE FloatVector load_e4m3(const std::uint8_t* from) {
#if defined(__AVX512F__)
  __m128i codes;
  std::memcpy(&codes, from, sizeof codes);
  const __m256i halves = _mm256_slli_epi16(_mm256_cvtepi8_epi16(codes), 7);
  return _mm512_maskz_cvtph_ps(kAll, _mm256_and_si256(halves, _mm256_set1_epi16(static_cast<short>(0xbf80))));
#else
  const __m128i codes = _mm_cvtepi8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)));
  const __m128i halves = _mm_and_si128(_mm_slli_epi16(codes, 7), _mm_set1_epi16(static_cast<short>(0xbf80)));
  return _mm256_cvtph_ps(halves);
#endif
}

// Stores 32 codes, which are bits 20 to 27 of the elements (kCodeShift in formats/microscaling.h).
#if defined(__AVX512F__)
ONEPASS_INLINE void store_codes(const BitVector (&codes)[2], std::uint8_t* to) {
  const Halves shifted = upper_halves(codes[0], codes[1]) >> 4;
  const __m256i bytes = _mm512_maskz_cvtepi16_epi8(0xffffffff, std::bit_cast<__m512i>(shifted));
  std::memcpy(to, &bytes, sizeof bytes);
}
#else
ONEPASS_INLINE void store_codes(const BitVector (&codes)[4], std::uint8_t* to) {
  const auto pack = [&](int i) {
    return _mm256_packus_epi32(std::bit_cast<__m256i>(codes[i] >> 20 & 0xffU),
                               std::bit_cast<__m256i>(codes[i + 1] >> 20 & 0xffU));
  };
  const __m256i bytes = _mm256_packus_epi16(pack(0), pack(2));
  const __m256i ordered = _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
  std::memcpy(to, &ordered, sizeof ordered);
}
#endif

// Returns `first`, `first` + 1, ...
ONEPASS_INLINE BitVector numbers_from(std::uint32_t first) {
  BitVector counts;
  for (int i = 0; i < kVectorWidth; ++i) counts[i] = static_cast<std::uint32_t>(i);
  return counts + first;
}

// Eight elements of 32 bits.
using EightFloats [[gnu::vector_size(32)]] = float;
using EightBits [[gnu::vector_size(32)]] = std::uint32_t;

// Returns the largest element of each of 8 vectors in memory.
ONEPASS_INLINE EightBits largest_elements(const BitVector* vectors) {
  EightBits values[8];
  for (int i = 0; i < 8; ++i) {
    const auto* const from = reinterpret_cast<const std::byte*>(vectors + i);
    values[i] = load_bytes<EightBits>(from);
    if constexpr (sizeof(BitVector) > sizeof(EightBits)) {
      const auto upper = load_bytes<EightBits>(from + sizeof(EightBits));
      values[i] = upper > values[i] ? upper : values[i];
    }
  }
  // Merges two vectors: the pairwise maxima of both, in turn.
  const auto fours_of = [](EightBits x, EightBits y) {
    const EightBits a = __builtin_shufflevector(x, y, 0, 8, 1, 9, 4, 12, 5, 13);
    const EightBits b = __builtin_shufflevector(x, y, 2, 10, 3, 11, 6, 14, 7, 15);
    return a > b ? a : b;
  };
  const auto twos_of = [](EightBits x, EightBits y) {
    const EightBits a = __builtin_shufflevector(x, y, 0, 1, 8, 9, 4, 5, 12, 13);
    const EightBits b = __builtin_shufflevector(x, y, 2, 3, 10, 11, 6, 7, 14, 15);
    return a > b ? a : b;
  };
  const EightBits first = twos_of(fours_of(values[0], values[1]), fours_of(values[2], values[3]));
  const EightBits second = twos_of(fours_of(values[4], values[5]), fours_of(values[6], values[7]));
  const EightBits a = __builtin_shufflevector(first, second, 0, 1, 2, 3, 8, 9, 10, 11);
  const EightBits b = __builtin_shufflevector(first, second, 4, 5, 6, 7, 12, 13, 14, 15);
  return a > b ? a : b;
}

// Returns x / 2 + y. The half is exact, so a fused multiply-add has the bits of a product and a sum.
ONEPASS_INLINE FloatVector half_plus(FloatVector x, float y) {
  const FloatVector addend = FloatVector{} + y;
  const FloatVector half = FloatVector{} + 0.5F;
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(x, half, addend);
#elif defined(__FMA__)
  return _mm256_fmadd_ps(x, half, addend);
#else
  return x * half + addend;
#endif
}

// Returns the smaller of each element and y. From a comparison with a constant, gcc 12 makes two instructions.
ONEPASS_INLINE BitVector smaller(BitVector x, std::uint32_t y) {
  const BitVector other = BitVector{} + y;
#if defined(__AVX512F__)
  return std::bit_cast<BitVector>(
      _mm512_maskz_min_epu32(kAll, std::bit_cast<__m512i>(x), std::bit_cast<__m512i>(other)));
#else
  return std::bit_cast<BitVector>(_mm256_min_epu32(std::bit_cast<__m256i>(x), std::bit_cast<__m256i>(other)));
#endif
}

ONEPASS_INLINE FloatVector square_root(FloatVector values) {
#if defined(__AVX512F__)
  return _mm512_maskz_sqrt_ps(kAll, values);
#else
  return _mm256_sqrt_ps(values);
#endif
}

}  // namespace onepass::inline ONEPASS_TARGET

#endif  // AVX2
