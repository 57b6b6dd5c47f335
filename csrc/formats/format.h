// How numbers lie in memory. Each format is one header with `decode` and `encode`; this registry is all that the rest
// of the code knows of them. with_format.h leads from an enumerator to its codec.
#pragma once

#include <cstddef>
#include <cstdint>

// X(name, Codec, bytes): the enumerator, which is also torch's name of the dtype, the struct that holds its codec, and
// the size of an element.
#define ONEPASS_FORMATS(X) \
  X(float32, Float32, 4)   \
  X(float64, Float64, 8)   \
  X(bfloat16, BFloat16, 2) \
  X(float16, Float16, 2)

namespace onepass {

enum class Format : std::uint8_t {
#define ONEPASS_X(name, Codec, bytes) name,
  ONEPASS_FORMATS(ONEPASS_X)
#undef ONEPASS_X
};

// Bytes per element.
constexpr std::size_t size_of(Format format) {
  switch (format) {
#define ONEPASS_X(name, Codec, bytes) \
  case Format::name:                  \
    return bytes;
    ONEPASS_FORMATS(ONEPASS_X)
#undef ONEPASS_X
  }
  return 0;
}

constexpr const char* name_of(Format format) {
  switch (format) {
#define ONEPASS_X(name, Codec, bytes) \
  case Format::name:                  \
    return #name;
    ONEPASS_FORMATS(ONEPASS_X)
#undef ONEPASS_X
  }
  return "?";
}

}  // namespace onepass
