// How numbers lie in memory. Each format is one header with `decode` and `encode`; this registry is all that the rest
// of the code knows of them.
#pragma once

#include <cstddef>
#include <cstdint>

// X(name, Type): the enumerator, which is also torch's name of the dtype, and the struct that holds its codec.
#define ONEPASS_FORMATS(X) \
  X(float32, Float32)      \
  X(float64, Float64)      \
  X(bfloat16, BFloat16)    \
  X(float16, Float16)

namespace onepass {

enum class Format : std::uint8_t {
#define ONEPASS_X(name, Type) name,
  ONEPASS_FORMATS(ONEPASS_X)
#undef ONEPASS_X
};

// Bytes per element.
constexpr std::size_t size_of(Format format) {
  switch (format) {
    case Format::float64:
      return 8;
    case Format::float32:
      return 4;
    case Format::bfloat16:
    case Format::float16:
      return 2;
  }
  return 0;
}

constexpr const char* name_of(Format format) {
  switch (format) {
#define ONEPASS_X(name, Type) \
  case Format::name:          \
    return #name;
    ONEPASS_FORMATS(ONEPASS_X)
#undef ONEPASS_X
  }
  return "?";
}

}  // namespace onepass
