#include "cpu/traffic.h"

#include <omp.h>

#include <algorithm>

namespace onepass {
namespace {

// A plain loop over N arrays at once. The widest vectors are not needed: memory is the limit.
template <int N>
void add(const Traffic& tensor, std::int64_t begin, std::int64_t end) {
  const float* read = tensor.read;
  float* updated[N];
  for (int k = 0; k < N; ++k) updated[k] = tensor.updated[static_cast<std::size_t>(k)];
#pragma GCC ivdep
  for (std::int64_t i = begin; i < end; ++i)
    for (int k = 0; k < N; ++k) updated[k][i] += read[i];
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
