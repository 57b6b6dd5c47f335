// Rounds tiles of operands of 16 bits stochastically (formats/stochastic.h).
#pragma once

#include <cstddef>
#include <cstdint>

#include "cpu/runs.h"
#include "formats/stochastic.h"
#include "formats/with_format.h"
#include "job.h"
#include "target.h"

namespace onepass::inline ONEPASS_TARGET {

// Rounds n elements to numbers that the format has. `index` is the first element's in the whole tensor.
template <class Codec, class T>
[[gnu::noinline]] void round_run(std::uint64_t key, std::size_t stream, std::int64_t index, T* values, std::int64_t n) {
  const bool second = stream % 2 != 0;
  while (n > 0) {
    const std::uint32_t product = first_product(key, stream, index);
    const std::int64_t alike = (std::int64_t{1} << 32) - index % (std::int64_t{1} << 32);  // with the same upper bits
    const std::int64_t count = alike < n ? alike : n;
    for (std::int64_t i = 0; i < count; ++i) {
      const std::uint32_t random = random_bits(product + static_cast<std::uint32_t>(i) * kIndexFactor);
      values[i] = static_cast<T>(rounded(Codec{}, static_cast<float>(values[i]), sixteen_of(second, random)));
    }
    index += count;
    values += count;
    n -= count;
  }
}

// Rounds elements [begin, begin + n) of an operand, which are in a tile.
template <class T>
void round_stochastically(const Job& job, std::size_t operand, std::int64_t begin, std::int64_t n, T* tile) {
  const std::size_t stream = operand == kParam ? kParamStream : operand - kFirstState;
  const auto round = [&](std::int64_t offset, std::int64_t, std::int64_t count) {
    const std::int64_t index = job.rounding.first + offset;
    if (job.operands.data()[operand].format == Format::bfloat16) {
      round_run<BFloat16>(job.rounding.key, stream, index, tile, count);
    } else {
      round_run<Float16>(job.rounding.key, stream, index, tile, count);
    }
    tile += count;
  };
  for_each_run(job.rows, nullptr, operand, begin, n, round);
}

}  // namespace onepass::inline ONEPASS_TARGET
