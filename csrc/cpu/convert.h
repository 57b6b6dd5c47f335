// Conversions between a storage format and plain arrays of the arithmetic type.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>

#include "formats/with_format.h"
#include "job.h"
#include "target.h"

#ifdef __F16C__
#include <immintrin.h>
#endif

namespace onepass::inline ONEPASS_TARGET {

// Loads and stores that make no claim on alignment: tensors may begin at any byte.
template <class Storage>
struct Unaligned {
  using type [[gnu::aligned(1), gnu::may_alias]] = Storage;
};

template <class Codec>
auto* stored(std::byte* data) {
  return reinterpret_cast<typename Unaligned<typename Codec::Storage>::type*>(data);
}

template <class Codec, class T>
void decode_run(std::byte* from, std::int64_t stride, T* to, std::int64_t n) {
  const auto* source = stored<Codec>(from);
  if (stride == 1) {
    for (std::int64_t i = 0; i < n; ++i) to[i] = Codec::template decode<T>(source[i]);
  } else {
    for (std::int64_t i = 0; i < n; ++i) to[i] = Codec::template decode<T>(source[i * stride]);
  }
}

template <class Codec, class T>
void encode_run(const T* from, std::byte* to, std::int64_t stride, std::int64_t n) {
  auto* target = stored<Codec>(to);
  if (stride == 1) {
    for (std::int64_t i = 0; i < n; ++i) target[i] = Codec::template encode<T>(from[i]);
  } else {
    for (std::int64_t i = 0; i < n; ++i) target[i * stride] = Codec::template encode<T>(from[i]);
  }
}

// The processor's own conversions, where it has them: a tenth of the instructions. Their bits are the codecs': they
// round to nearest even, keep a NaN's sign and upper payload, and make it quiet. Float32's denormals, which a step does
// not have, would be zero; those of float16 survive whatever the mode.
#ifdef __F16C__
#ifdef __AVX512F__
inline constexpr __mmask16 kAll = 0xffff;  // gcc 12 warns of its own header where these have no mask; it drops this one
#endif

template <>
inline void decode_run<Float16, float>(std::byte* from, std::int64_t stride, float* to, std::int64_t n) {
  const auto* source = stored<Float16>(from);
  std::int64_t i = 0;
  if (stride == 1) {
#ifdef __AVX512F__
    for (; i + 16 <= n; i += 16)
      _mm512_storeu_ps(to + i,
                       _mm512_maskz_cvtph_ps(kAll, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(source + i))));
#endif
    for (; i + 8 <= n; i += 8)
      _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(source + i))));
  }
  for (; i < n; ++i) to[i] = Float16::decode<float>(source[i * stride]);
}

template <>
inline void encode_run<Float16, float>(const float* from, std::byte* to, std::int64_t stride, std::int64_t n) {
  auto* target = stored<Float16>(to);
  std::int64_t i = 0;
  if (stride == 1) {
#ifdef __AVX512F__
    for (; i + 16 <= n; i += 16) {
      const __m256i encoded =
          _mm512_maskz_cvtps_ph(kAll, _mm512_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(target + i), encoded);
    }
#endif
    for (; i + 8 <= n; i += 8) {
      const __m128i encoded = _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(target + i), encoded);
    }
  }
  for (; i < n; ++i) target[i * stride] = Float16::encode(from[i]);
}
#endif

#ifdef __AVX512BF16__
template <>
inline void encode_run<BFloat16, float>(const float* from, std::byte* to, std::int64_t stride, std::int64_t n) {
  auto* target = stored<BFloat16>(to);
  std::int64_t i = 0;
  if (stride == 1)
    for (; i + 32 <= n; i += 32) {
      const auto pair = _mm512_cvtne2ps_pbh(_mm512_loadu_ps(from + i + 16), _mm512_loadu_ps(from + i));
      _mm512_storeu_si512(target + i, std::bit_cast<__m512i>(pair));
    }
  for (; i < n; ++i) target[i * stride] = BFloat16::encode(from[i]);
}
#endif

// Elements of an operand, whatever its format, to and from a plain array; offset and stride are in elements.
template <class T>
void read_run(const Operand& source, std::int64_t offset, std::int64_t stride, T* to, std::int64_t n) {
  std::byte* from = source.data + offset * static_cast<std::int64_t>(size_of(source.format));
  with_format(source.format, [&]<class Codec>(Codec) { decode_run<Codec>(from, stride, to, n); });
}

template <class T>
void write_run(const Operand& target, std::int64_t offset, std::int64_t stride, const T* from, std::int64_t n) {
  std::byte* to = target.data + offset * static_cast<std::int64_t>(size_of(target.format));
  with_format(target.format, [&]<class Codec>(Codec) { encode_run<Codec>(from, to, stride, n); });
}

template <class T>
constexpr Format native_format() {
  return sizeof(T) == 4 ? Format::float32 : Format::float64;
}

// Whether a packed operand is a plain array of T.
template <class T>
bool is_plain_array(const Operand& operand) {
  return operand.format == native_format<T>() && reinterpret_cast<std::uintptr_t>(operand.data) % sizeof(T) == 0;
}

}  // namespace onepass::inline ONEPASS_TARGET
