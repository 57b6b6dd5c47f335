// bfloat16 and float16 against their definition, for all 65,536 patterns and values between two of them.
#include <doctest/doctest.h>

#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>
#include <vector>

#include "cpu/fpmode.h"
#include "formats/bfloat16.h"
#include "formats/float16.h"
#include "formats/float32.h"
#include "formats/float64.h"
#include "formats/low_bits.h"

namespace onepass {
namespace {

// The parameters of a 16-bit format in the standard.
template <class Codec>
struct Definition;
template <>
struct Definition<BFloat16> {
  static constexpr int fraction_bits = 7, bias = 127;
};
template <>
struct Definition<Float16> {
  static constexpr int fraction_bits = 10, bias = 15;
};

template <class Codec>
constexpr std::uint16_t infinity_of() {
  return static_cast<std::uint16_t>(0x7fffU >> Definition<Codec>::fraction_bits << Definition<Codec>::fraction_bits);
}

// Returns the magnitude of a pattern. For infinity it is the magnitude that the next number would have, as rounding
// needs it.
template <class Codec>
double magnitude_of(unsigned bits) {
  using D = Definition<Codec>;
  const int exponent = static_cast<int>((bits & 0x7fffU) >> D::fraction_bits);
  const int fraction = static_cast<int>(bits & ((1U << D::fraction_bits) - 1));
  const int implicit = exponent == 0 ? 0 : 1 << D::fraction_bits;
  return std::ldexp(implicit + fraction, (exponent == 0 ? 1 : exponent) - D::bias - D::fraction_bits);
}

template <class Codec>
double value_of(unsigned bits) {
  const unsigned magnitude = bits & 0x7fffU;
  const double value = magnitude > infinity_of<Codec>()    ? std::numeric_limits<double>::quiet_NaN()
                       : magnitude == infinity_of<Codec>() ? std::numeric_limits<double>::infinity()
                                                           : magnitude_of<Codec>(magnitude);
  return (bits & 0x8000U) != 0U ? -value : value;
}

template <class Codec, class T>
struct Encoding {
  T value;
  std::uint16_t want;
};

// A format and an arithmetic type, in the step's floating-point mode or in the default one. The functions are not
// inlined, so that no operation moves out of the mode.
template <class C, class Type, bool kInStep>
struct Codes {
  using Codec = C;
  using T = Type;
  static constexpr bool in_step = kInStep;

  [[gnu::noinline]] static void decode_all(std::vector<T>& to) {
    for (unsigned bits = 0; bits < to.size(); ++bits)
      to[bits] = Codec::template decode<T>(static_cast<std::uint16_t>(bits));
  }
  [[gnu::noinline]] static void encode_all(const std::vector<T>& from, std::vector<std::uint16_t>& to) {
    for (std::size_t i = 0; i < from.size(); ++i) to[i] = Codec::template encode<T>(from[i]);
  }
  static std::vector<T> decoded() {
    std::vector<T> values(0x10000);
    if constexpr (kInStep) {
      const StepMode mode;
      decode_all(values);
    } else {
      decode_all(values);
    }
    return values;
  }
  static std::vector<std::uint16_t> encoded(const std::vector<T>& values) {
    std::vector<std::uint16_t> bits(values.size());
    if constexpr (kInStep) {
      const StepMode mode;
      encode_all(values, bits);
    } else {
      encode_all(values, bits);
    }
    return bits;
  }
};

// In a step, float64 is rounded to float32, whose denormals are flushed. Only bfloat16 has such small numbers.
template <class C>
bool flushed(double value) {
  return C::in_step && std::is_same_v<typename C::T, double> && std::fabs(value) < 0x1p-126;
}

template <class T>
std::uint64_t bits_of(T value) {
  if constexpr (sizeof(T) == 4)
    return std::bit_cast<std::uint32_t>(value);
  else
    return std::bit_cast<std::uint64_t>(value);
}

#define ALL_CODES                                                                                 \
  Codes<BFloat16, float, false>, Codes<BFloat16, double, false>, Codes<Float16, float, false>,    \
      Codes<Float16, double, false>, Codes<BFloat16, float, true>, Codes<BFloat16, double, true>, \
      Codes<Float16, float, true>, Codes<Float16, double, true>

TEST_CASE_TEMPLATE("every pattern decodes to its value and encodes to itself", C, ALL_CODES) {
  using T = typename C::T;
  const std::vector<T> values = C::decoded();
  const std::vector<std::uint16_t> again = C::encoded(values);
  constexpr std::uint16_t infinity = infinity_of<typename C::Codec>();
  constexpr unsigned quiet = 1U << (Definition<typename C::Codec>::fraction_bits - 1);
  for (unsigned bits = 0; bits < 0x10000; ++bits) {
    CAPTURE(bits);
    const double want = value_of<typename C::Codec>(bits);
    if ((bits & 0x7fffU) > infinity) {
      CHECK(std::isnan(values[bits]));
      CHECK(std::signbit(values[bits]) == ((bits & 0x8000U) != 0U));
      CHECK(again[bits] == (bits | quiet));
    } else if (flushed<C>(want)) {
      CHECK(values[bits] == T(0));
      CHECK(again[bits] == (bits & 0x8000U));
    } else {
      CHECK(bits_of(values[bits]) == bits_of(static_cast<T>(want)));
      CHECK(again[bits] == bits);
    }
  }
}

TEST_CASE_TEMPLATE("rounding to the nearer neighbour, and in the middle to the even one", C, ALL_CODES) {
  using T = typename C::T;
  using Codec = typename C::Codec;
  std::vector<T> values;
  std::vector<std::uint16_t> want;
  // The last pair is the largest number and infinity.
  for (unsigned low = 0; low < infinity_of<Codec>(); ++low) {
    const unsigned high = low + 1;
    const auto middle = static_cast<float>((magnitude_of<Codec>(low) + magnitude_of<Codec>(high)) / 2);
    for (const unsigned sign : {0U, 0x8000U}) {
      const auto add = [&](float magnitude, unsigned bits) {
        if (flushed<C>(magnitude)) bits = 0;
        values.push_back(static_cast<T>(sign != 0U ? -magnitude : magnitude));
        want.push_back(static_cast<std::uint16_t>(bits | sign));
      };
      add(middle, low % 2 == 0 ? low : high);
      add(std::nextafter(middle, 0.0F), low);
      add(std::nextafter(middle, std::numeric_limits<float>::infinity()), high);
    }
  }
  const std::vector<std::uint16_t> got = C::encoded(values);
  for (std::size_t i = 0; i < values.size(); ++i) {
    CAPTURE(values[i]);
    CHECK(got[i] == want[i]);
  }
}

TEST_CASE_TEMPLATE("the ends of the range, and values beyond it", C, ALL_CODES) {
  using T = typename C::T;
  using Codec = typename C::Codec;
  constexpr bool half = std::is_same_v<Codec, Float16>;
  constexpr std::uint16_t infinity = infinity_of<Codec>();
  constexpr std::uint16_t largest = infinity - 1;
  const T threshold = half ? T(65520) : T(0x1.ffp127);
  const std::vector<Encoding<Codec, T>> table = {
      {std::numeric_limits<T>::infinity(), infinity},
      {std::numeric_limits<T>::max(), infinity},
      {threshold, infinity},
      {static_cast<T>(std::nextafter(static_cast<float>(threshold), 0.0F)), largest},
      {half ? T(0x1p-24) : T(0x1p-126), half ? std::uint16_t{0x0001} : std::uint16_t{0x0080}},
      {half ? T(0x1.8p-25) : T(0x1.01p-126), half ? std::uint16_t{0x0001} : std::uint16_t{0x0080}},
      {half ? T(0x1p-25) : T(0), 0},
      {half ? T(0x1p-126) : T(0), 0},
      {std::numeric_limits<T>::denorm_min(), 0},
      {std::numeric_limits<T>::min(), std::uint16_t{half || sizeof(T) == 8 ? 0x0000 : 0x0080}},
      {T(1), half ? std::uint16_t{0x3c00} : std::uint16_t{0x3f80}},
  };
  for (const auto& [value, want] : table) {
    CAPTURE(value);
    CHECK(C::encoded({value})[0] == want);
    CHECK(C::encoded({-value})[0] == (want | 0x8000U));
  }
}

TEST_CASE_TEMPLATE("a NaN whose payload does not fit is still a quiet NaN of its sign", C, ALL_CODES) {
  using T = typename C::T;
  constexpr unsigned infinity = infinity_of<typename C::Codec>();
  constexpr unsigned quiet = 1U << (Definition<typename C::Codec>::fraction_bits - 1);
  for (const std::uint32_t payload : {0x000001U, 0x001fffU, 0x00ffffU, 0x3fffffU, 0x400000U, 0x7fffffU}) {
    for (const std::uint32_t sign : {0U, 0x80000000U}) {
      CAPTURE(payload);
      const unsigned got = C::encoded({static_cast<T>(std::bit_cast<float>(0x7f800000U | payload | sign))})[0];
      CHECK((got & (infinity | quiet)) == (infinity | quiet));
      CHECK((got & 0x8000U) == sign >> 16);
    }
  }
}

TEST_CASE_TEMPLATE("float64 is rounded to float32 first", Codec, BFloat16, Float16) {
  using D = Definition<Codec>;
  // Above the middle between 1 and the next number, by less than half a unit of float32: float32 rounds it to the
  // middle.
  const double above = 1.0 + std::ldexp(1.0, -D::fraction_bits - 1) + 0x1p-40;
  CHECK(Codec::encode(above) == Codec::encode(1.0));
  CHECK(Codec::encode(above) == Codec::encode(static_cast<float>(above)));
  CHECK(Codec::encode(1e300) == infinity_of<Codec>());
  CHECK(Codec::encode(-1e-300) == 0x8000U);
}

// All 2^32 patterns: denormals, infinities and numbers that round to infinity, too. Under a sanitizer, every 61st.
TEST_CASE("a float32 number is restored from its low bits and the bfloat16 number beside it") {
#if defined(__SANITIZE_ADDRESS__)
  constexpr std::uint64_t stride = 61;
#else
  constexpr std::uint64_t stride = 1;
#endif
  std::uint64_t wrong = 0;
  for (std::uint64_t pattern = 0; pattern < (std::uint64_t{1} << 32); pattern += stride) {
    const auto bits = static_cast<std::uint32_t>(pattern);
    const auto master = std::bit_cast<float>(bits);
    const std::uint32_t high = std::uint32_t{LowBits::high_of(master)} << 16;
    const std::uint16_t low = LowBits::low_of(master);
    const auto joined = std::bit_cast<std::uint32_t>(LowBits::join(std::bit_cast<float>(high), low));
    // The joined bits of a NaN are those of its quiet upper half. Others are within half a unit of `high`.
    const std::uint32_t want = is_nan(bits) ? (bits | 0x400000U) & 0xffff0000U : bits;
    wrong += joined != want || (want - high) + 0x8000U >= 0x10000U ? 1 : 0;
  }
  CHECK(wrong == 0);
}

TEST_CASE("negative low bits beside a zero do not count") {
  for (const std::uint32_t zero : {0x00000000U, 0x80000000U})
    for (const std::uint16_t low : {std::uint16_t{0x8000}, std::uint16_t{0xffff}, std::uint16_t{0xbe77}})
      CHECK(std::bit_cast<std::uint32_t>(LowBits::join(std::bit_cast<float>(zero), low)) == zero);
}

TEST_CASE("ties are rounded away from zero, so that no two numbers have the same bits") {
  struct {
    std::uint32_t master;
    std::uint16_t high, low;
  } const table[] = {
      {0x3f808000, 0x3f81, 0x8000}, {0x3f818000, 0x3f82, 0x8000}, {0xbf808000, 0xbf81, 0x8000},
      {0x3f807fff, 0x3f80, 0x7fff}, {0x00008000, 0x0001, 0x8000}, {0x80000000, 0x8000, 0x0000},
      {0x7f7f8000, 0x7f80, 0x8000}, {0x7f7fffff, 0x7f80, 0xffff}, {0x7f800000, 0x7f80, 0x0000},
      {0x7f800001, 0x7fc0, 0x0000}, {0xffffffff, 0xffff, 0x0000},
  };
  for (const auto& row : table) {
    CAPTURE(row.master);
    CHECK(LowBits::high_of(std::bit_cast<float>(row.master)) == row.high);
    CHECK(LowBits::low_of(std::bit_cast<float>(row.master)) == row.low);
  }
}

TEST_CASE("float32 and float64 convert as the language does") {
  const double third = 1.0 / 3.0;
  CHECK(Float32::encode(third) == static_cast<float>(third));
  CHECK(Float32::decode<double>(0.1F) == static_cast<double>(0.1F));
  CHECK(Float64::decode<float>(third) == static_cast<float>(third));
  CHECK(Float64::decode<double>(third) == third);
  CHECK(Float64::encode(0.1F) == static_cast<double>(0.1F));
  CHECK(Float32::encode(1e300) == std::numeric_limits<float>::infinity());
}

}  // namespace
}  // namespace onepass
