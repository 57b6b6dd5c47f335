// The format of 8-bit states (formats/microscaling.h) against its definition, in double.
#include "formats/microscaling.h"

#include <doctest/doctest.h>

#include <bit>
#include <cmath>
#include <cstdint>
#include <initializer_list>
#include <limits>

#include "cpu/fpmode.h"

namespace onepass {
namespace {

// The value of an E4M3 code, by the definition.
double value_of(int code) {
  const int exponent = code >> 3 & 15;
  const int mantissa = code & 7;
  const double magnitude = exponent == 0 ? std::ldexp(mantissa, -9) : std::ldexp(8 + mantissa, exponent - 10);
  return (code & 0x80) != 0 ? -magnitude : magnitude;
}

// Returns the code of a stored value with these 20 random bits.
template <Coding coding>
int encoded(float stored, float factor, std::uint32_t random) {
  return code_of(encode_state<coding>(stored, factor, random << 12));
}

// Codes but 0x7f and 0xff, which are NaN in the standard and are never written.
template <class Visit>
void for_each_code(Visit&& visit) {
  for (int code = 0; code < 256; ++code)
    if ((code & 0x7f) != 0x7f) visit(code);
}

constexpr std::uint32_t kRandom[] = {0, 1, 0x7ffff, 0x80000, 0xffffe, 0xfffff};

TEST_CASE("every code is decoded to its value, times 2^-8") {
  const StepMode mode;
  for_each_code([](int code) {
    const float decoded = decode_e4m3(static_cast<std::uint8_t>(code));
    CHECK(static_cast<double>(decoded) == std::ldexp(value_of(code), -8));
    CHECK(std::signbit(decoded) == ((code & 0x80) != 0));
  });
}

TEST_CASE("the value of a code is encoded to this code, whatever the random bits") {
  const StepMode mode;
  for_each_code([](int code) {
    for (const std::uint32_t scale : {1U, 100U, 127U, 245U})
      for (const std::uint32_t random : kRandom) {
        const double value = std::ldexp(value_of(code), static_cast<int>(scale) - 127);
        if (value != 0 && std::abs(value) < 0x1p-126) continue;  // flushed
        const auto stored = static_cast<float>(value);
        const auto factor = encoding_factor<float>(scale);
        CHECK(encoded<Coding::signed_values>(stored, factor, random) == code);
        if (code < 0x80) CHECK(encoded<Coding::magnitudes>(stored, factor, random) == code);
      }
  });
}

TEST_CASE("values between two codes are rounded up by as many of the 2^20 random numbers as their distance") {
  const StepMode mode;
  const auto factor = encoding_factor<float>(127U);
  for (int code = 0; code < 0x7e; ++code) {
    const double low = value_of(code);
    const double step = value_of(code + 1) - low;
    for (const double part : {1.0 / 1024, 0.25, 0.5, 1023.0 / 1024}) {
      const auto value = static_cast<float>(low + part * step);
      const auto first = static_cast<std::uint32_t>(std::ldexp(1.0 - part, 20));  // the smallest that rounds up
      const auto encode = [&](std::uint32_t random) { return encoded<Coding::signed_values>(value, factor, random); };
      CHECK(encode(0) == code);
      CHECK(encode(first - 1) == code);
      CHECK(encode(first) == code + 1);
      CHECK(encode(0xfffff) == code + 1);
    }
  }
}

TEST_CASE("the scale is the smallest power of two with which the largest is at most 448") {
  for (int exponent = -118; exponent <= 125; ++exponent)
    for (const double mantissa : {1.0, 1.5, 1.75, std::nextafter(1.75F, 2.0F) * 1.0, 1.999}) {
      const double largest = std::ldexp(mantissa, exponent);
      const auto scale = scale_for(std::bit_cast<std::uint32_t>(static_cast<float>(largest)));
      const double value = std::ldexp(1.0, static_cast<int>(scale) - 127);
      CHECK(largest <= 448 * value);
      if (scale > 1) CHECK(largest > 448 * value / 2);
      CHECK(static_cast<double>(decoding_factor<float>(scale)) == std::ldexp(value, 8));
    }
  CHECK(scale_for(0U) == 1);
  CHECK(scale_for(std::bit_cast<std::uint32_t>(448 * 0x1p118F)) == 245);
  for (const float value : {std::nextafter(448 * 0x1p118F, std::numeric_limits<float>::infinity()),
                            std::numeric_limits<float>::infinity(), std::numeric_limits<float>::quiet_NaN()})
    CHECK(scale_for(magnitude_of<std::uint32_t>(value)) == kNanScale);
  CHECK(std::isnan(decoding_factor<float>(kNanScale)));
}

TEST_CASE("what a step divides by is encoded to zero only if it is zero") {
  const StepMode mode;
  const auto factor = encoding_factor<float>(127U);
  for (const std::uint32_t random : kRandom) {
    CHECK(encoded<Coding::magnitudes>(0x1p-100F, factor, random) == 1);
    CHECK(encoded<Coding::magnitudes>(0.0F, factor, random) == 0);
    CHECK(encoded<Coding::signed_values>(0x1p-100F, factor, random) == 0);
  }
}

TEST_CASE("an average of squares is stored by its root") {
  const StepMode mode;
  for_each_code([](int code) {
    if (code >= 0x80) return;
    const float decoded =
        state_value<Coding::squares>(decode_e4m3(static_cast<std::uint8_t>(code)), decoding_factor<float>(127U));
    CHECK(static_cast<double>(decoded) == value_of(code) * value_of(code));
    CHECK(stored_value<Coding::squares>(decoded) == static_cast<float>(value_of(code)));
  });
}

}  // namespace
}  // namespace onepass
