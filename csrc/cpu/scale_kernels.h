// The kernels that scale and clamp gradients in place.
#pragma once

#include <cstdint>

#include "cpu/driver.h"
#include "cpu/scale.h"
#include "cpu/tile.h"
#include "target.h"

namespace onepass::inline ONEPASS_TARGET {

template <class T>
void multiply(T factor, T* values, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) values[i] *= factor;
}

#ifdef ONEPASS_FLOAT_VECTOR
// Multiplies packed elements a register at a time, and returns the number of elements multiplied.
template <class Codec>
std::int64_t multiply_vectors(float factor, std::byte* data, std::int64_t n) {
  std::int64_t i = 0;
  for (; i + kVectorWidth <= n; i += kVectorWidth) {
    std::byte* at = data + i * static_cast<std::int64_t>(sizeof(typename Codec::Storage));
    store_vector(Codec{}, at, load_vector(Codec{}, at) * factor);
  }
  return i;
}
#endif

// T is the arithmetic type of the step, in which the gradient is decoded.
template <class T>
void scale(const Job& job, std::int64_t begin, std::int64_t end) {
  alignas(64) T tile[kTile<T>];
  const Operand& grad = job.operands.data()[kGrad];
  const auto factor = static_cast<T>(job.grad_factor);
  const bool clamps = job.clip_value != kNoLimit;
  const bool packed = job.layout == nullptr;
  const bool in_place = packed && is_plain_array<T>(grad);
#ifdef ONEPASS_FLOAT_VECTOR
  if constexpr (sizeof(T) == 4) {
    if (packed && !clamps && grad.format == Format::bfloat16)
      begin += multiply_vectors<BFloat16>(factor, element(grad, begin), end - begin);
    if (packed && !clamps && grad.format == Format::float16)
      begin += multiply_vectors<Float16>(factor, element(grad, begin), end - begin);
  }
#endif
  const std::int64_t most = in_place ? end - begin : kTile<T>;
  for (std::int64_t at = begin; at < end; at += most) {
    const std::int64_t n = end - at < most ? end - at : most;
    T* values = in_place ? reinterpret_cast<T*>(grad.data) + at : tile;
    if (!in_place) decode(job, kGrad, at, n, tile);
    if (clamps) {
      scale_and_clamp(factor, job.clip_value_as<T>(), values, n);
    } else {
      multiply(factor, values, n);
    }
    if (!in_place) encode(job, kGrad, at, n, tile);
  }
}

}  // namespace onepass::inline ONEPASS_TARGET
