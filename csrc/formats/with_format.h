// The codec of a format that is known at run time or at compile time.
#pragma once

#include "formats/bfloat16.h"
#include "formats/float16.h"
#include "formats/float32.h"
#include "formats/float64.h"
#include "formats/format.h"
#include "target.h"

namespace onepass::inline ONEPASS_TARGET {

#define ONEPASS_X(name, Codec, bytes) static_assert(sizeof(Codec::Storage) == bytes);
ONEPASS_FORMATS(ONEPASS_X)
#undef ONEPASS_X

template <Format format>
struct CodecOfFormat;
#define ONEPASS_X(name, Codec, bytes)  \
  template <>                          \
  struct CodecOfFormat<Format::name> { \
    using type = Codec;                \
  };
ONEPASS_FORMATS(ONEPASS_X)
#undef ONEPASS_X

// The codec of a format that is known at compile time.
template <Format format>
using CodecOf = typename CodecOfFormat<format>::type;

// Returns visit(codec), where `codec` is an object of the format's codec type: `[&]<class Codec>(Codec) { ... }`.
template <class Visit>
ONEPASS_INLINE constexpr decltype(auto) with_format(Format format, Visit&& visit) {
  switch (format) {
#define ONEPASS_X(name, Codec, bytes) \
  case Format::name:                  \
    return visit(Codec{});
    ONEPASS_FORMATS(ONEPASS_X)
#undef ONEPASS_X
    case Format::float8_e4m3fn:  // the callers have handled it
      break;
  }
  __builtin_unreachable();
}

}  // namespace onepass::inline ONEPASS_TARGET
