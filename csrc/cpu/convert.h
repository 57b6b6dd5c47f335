// Conversions between a storage format and plain arrays of the arithmetic type.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "cpu/float_vector.h"
#include "formats/with_format.h"
#include "job.h"
#include "target.h"

namespace onepass::inline ONEPASS_TARGET {

// A type for loads and stores that need no alignment: tensors may begin at any byte.
template <class Storage>
struct Unaligned {
  using type [[gnu::aligned(1), gnu::may_alias]] = Storage;
};

template <class Codec>
auto* stored(std::byte* data) {
  return reinterpret_cast<typename Unaligned<typename Codec::Storage>::type*>(data);
}

template <class T>
auto* as_bytes(T* array) {
  return reinterpret_cast<std::conditional_t<std::is_const_v<T>, const std::byte, std::byte>*>(array);
}

#ifdef ONEPASS_FLOAT_VECTOR
// Whether packed elements are converted a register at a time.
template <class Codec, class T>
inline constexpr bool kByVectors = std::is_same_v<T, float> && sizeof(typename Codec::Storage) == 2;

// Convert whole registers of elements, and return the number of elements converted.
template <class Codec>
std::int64_t decode_vectors(const std::byte* from, float* to, std::int64_t n) {
  std::int64_t i = 0;
  for (; i + kVectorWidth <= n; i += kVectorWidth)
    store_vector(Float32{}, as_bytes(to + i), load_vector(Codec{}, from + 2 * i));
  return i;
}
template <class Codec>
std::int64_t encode_vectors(const float* from, std::byte* to, std::int64_t n) {
  std::int64_t i = 0;
  for (; i + kVectorWidth <= n; i += kVectorWidth)
    store_vector(Codec{}, to + 2 * i, load_vector(Float32{}, as_bytes(from + i)));
  return i;
}
#endif

template <class Codec, class T>
void decode_run(std::byte* from, std::int64_t stride, T* to, std::int64_t n) {
  const auto* source = stored<Codec>(from);
  if (stride == 1) {
    std::int64_t i = 0;
#ifdef ONEPASS_FLOAT_VECTOR
    if constexpr (kByVectors<Codec, T>) i = decode_vectors<Codec>(from, to, n);
#endif
    for (; i < n; ++i) to[i] = Codec::template decode<T>(source[i]);
  } else {
    for (std::int64_t i = 0; i < n; ++i) to[i] = Codec::template decode<T>(source[i * stride]);
  }
}

template <class Codec, class T>
void encode_run(const T* from, std::byte* to, std::int64_t stride, std::int64_t n) {
  auto* target = stored<Codec>(to);
  if (stride == 1) {
    std::int64_t i = 0;
#ifdef ONEPASS_FLOAT_VECTOR
    if constexpr (kByVectors<Codec, T>) i = encode_vectors<Codec>(from, to, n);
#endif
    for (; i < n; ++i) target[i] = Codec::template encode<T>(from[i]);
  } else {
    for (std::int64_t i = 0; i < n; ++i) target[i * stride] = Codec::template encode<T>(from[i]);
  }
}

// Returns the address of an operand's element; `offset` is in elements.
ONEPASS_INLINE std::byte* element(const Operand& operand, std::int64_t offset) {
  return operand.data + offset * static_cast<std::int64_t>(size_of(operand.format));
}

// Copy elements of an operand in any format to and from a plain array; `offset` and `stride` are in elements.
template <class T>
void read_run(const Operand& source, std::int64_t offset, std::int64_t stride, T* to, std::int64_t n) {
  std::byte* from = element(source, offset);
  with_format(source.format, [&]<class Codec>(Codec) { decode_run<Codec>(from, stride, to, n); });
}

template <class T>
void write_run(const Operand& target, std::int64_t offset, std::int64_t stride, const T* from, std::int64_t n) {
  std::byte* to = element(target, offset);
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
