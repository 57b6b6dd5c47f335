#include "cpu/traffic.h"

#include <omp.h>

#include <algorithm>

namespace onepass {
namespace {

constexpr std::int64_t kTile = 256;  // as of the kernels, which fetch as far ahead
constexpr std::int64_t kAhead = 2 * kTile;
constexpr std::int64_t kFloatsInLine = 16;

// A loop over N arrays at once. The widest vectors are not needed: memory is the limit.
template <int N>
void add(const Traffic& tensor, std::int64_t begin, std::int64_t end) {
  const float* read = tensor.read;
  float* updated[N];
  for (int k = 0; k < N; ++k) updated[k] = tensor.updated[static_cast<std::size_t>(k)];
  for (std::int64_t at = begin; at < end; at += kTile) {
    const std::int64_t stop = std::min(at + kTile, end);
    if (at + kAhead + kTile <= end) {
      const auto fetch = [&](const float* array) {
        for (std::int64_t i = 0; i < kTile; i += kFloatsInLine) __builtin_prefetch(array + at + kAhead + i);
      };
      fetch(read);
      for (int k = 0; k < N; ++k) fetch(updated[k]);
    }
#pragma GCC ivdep
    for (std::int64_t i = at; i < stop; ++i)
      for (int k = 0; k < N; ++k) updated[k][i] += read[i];
  }
}

void add_range(const Traffic& tensor, std::int64_t begin, std::int64_t end) {
  switch (tensor.updated.size()) {
    case 1:
      return add<1>(tensor, begin, end);
    case 2:
      return add<2>(tensor, begin, end);
    case 3:
      return add<3>(tensor, begin, end);
    case 4:
      return add<4>(tensor, begin, end);
    case 5:
      return add<5>(tensor, begin, end);
    default:
      return add<6>(tensor, begin, end);
  }
}

}  // namespace

void move_traffic(std::span<const Traffic> tensors, int threads) {
  std::int64_t total = 0;
  for (const Traffic& tensor : tensors) total += tensor.length;
#pragma omp parallel num_threads(threads)
  {
    const std::int64_t share = total / omp_get_num_threads();
    const std::int64_t low = share * omp_get_thread_num();
    const std::int64_t high = omp_get_thread_num() + 1 == omp_get_num_threads() ? total : low + share;
    std::int64_t at = 0;
    for (const Traffic& tensor : tensors) {
      const std::int64_t begin = std::clamp(low - at, std::int64_t{0}, tensor.length);
      const std::int64_t end = std::clamp(high - at, std::int64_t{0}, tensor.length);
      if (begin < end) add_range(tensor, begin, end);
      at += tensor.length;
    }
  }
}

}  // namespace onepass
