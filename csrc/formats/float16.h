// IEEE 754 binary16. Encoding rounds to nearest, ties to even; from 65,520 on the result is infinite (65,504 is the
// largest number). A NaN keeps its sign and its upper payload and becomes quiet. float64 is rounded to float32 first,
// as in torch.
//
// Written in integers and one float addition, so that it vectorizes for every instruction set with the same bits, and
// so that float16's denormals are kept although the step flushes those of float32. A GPU has instructions for the same
// conversions, except that they make one NaN of all.
#pragma once

#include <bit>
#include <cstdint>

#include "target.h"

namespace onepass::inline ONEPASS_TARGET {

struct Float16 {
  using Storage = std::uint16_t;
  static constexpr int kSignificantBits = 11;

  template <class T>
  ONEPASS_INLINE static T decode(Storage value) {
#ifdef __CUDA_ARCH__
    float decoded;
    asm("cvt.f32.f16 %0, %1;" : "=f"(decoded) : "h"(value));
    return static_cast<T>(decoded);
#else
    const std::uint32_t magnitude = value & 0x7fffU;
    const std::uint32_t sign = static_cast<std::uint32_t>(value & 0x8000U) << 16;
    // Exponent bias 15 becomes 127: add 112 to the exponent, twice for infinity and NaN, whose exponent is all ones.
    const std::uint32_t normal = (magnitude << 13) + (112U << 23);
    const std::uint32_t special = (magnitude << 13) + (224U << 23);
    // A denormal m * 2^-24 is (1 + m/1024) * 2^-14 less 2^-14, both of them normal in float32.
    const auto denormal = std::bit_cast<std::uint32_t>(std::bit_cast<float>((magnitude << 13) + (113U << 23)) -
                                                       std::bit_cast<float>(113U << 23));
    const std::uint32_t finite = magnitude < 0x400U ? denormal : normal;
    return static_cast<T>(std::bit_cast<float>((magnitude >= 0x7c00U ? special : finite) | sign));
#endif
  }

  template <class T>
  ONEPASS_INLINE static Storage encode(T value) {
#ifdef __CUDA_ARCH__
    Storage encoded;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(encoded) : "f"(static_cast<float>(value)));
    return encoded;
#else
    const auto bits = std::bit_cast<std::uint32_t>(static_cast<float>(value));
    const std::uint32_t magnitude = bits & 0x7fffffffU;
    const std::uint32_t sign = (bits >> 16) & 0x8000U;
    // Lower the exponent's bias by 112 and round at bit 13 to nearest even. A carry into the exponent is correct.
    const std::uint32_t normal = (magnitude - (112U << 23) + 0xfffU + ((magnitude >> 13) & 1U)) >> 13;
    // Below 2^-14 the result is a multiple of 2^-24, which is the last place of 0.5, so the addition rounds it.
    const std::uint32_t denormal =
        std::bit_cast<std::uint32_t>(std::bit_cast<float>(magnitude) + 0.5F) - std::bit_cast<std::uint32_t>(0.5F);
    const std::uint32_t nan = 0x7e00U | ((magnitude >> 13) & 0x3ffU);
    const std::uint32_t finite = magnitude < (113U << 23) ? denormal : normal;
    const std::uint32_t number = magnitude >= (143U << 23) ? 0x7c00U : finite;
    return static_cast<Storage>((magnitude > 0x7f800000U ? nan : number) | sign);
#endif
  }
};

}  // namespace onepass::inline ONEPASS_TARGET
