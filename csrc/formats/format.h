// Storage formats. Each is one header with `decode` and `encode`. Other code uses them through this list, and through
// with_format.h, which returns the codec of an enumerator.
#pragma once

#include <cstddef>
#include <cstdint>

// X(name, Codec, bytes): the enumerator, which is also torch's name of the dtype; the struct of its codec; the size of
// an element.
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
      float8_e4m3fn,  // codes of a state in blocks (microscaling.h): no format of single elements, so without a codec
};

// Bytes per element.
constexpr std::size_t size_of(Format format) {
  switch (format) {
#define ONEPASS_X(name, Codec, bytes) \
  case Format::name:                  \
    return bytes;
    ONEPASS_FORMATS(ONEPASS_X)
#undef ONEPASS_X
    case Format::float8_e4m3fn:
      return 1;
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
    case Format::float8_e4m3fn:
      return "float8_e4m3fn";
  }
  return "?";
}

}  // namespace onepass
