#include "traffic/traffic.h"

#include <omp.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <stdexcept>
#include <string>
#include <utility>

namespace onepass {
namespace {

constexpr std::int64_t kFloatsInLine = 16;

// Registers of 16 bytes, which every processor has. Wider ones are not faster, because memory is the limit.
using Four [[gnu::vector_size(16), gnu::aligned(4), gnu::may_alias]] = float;
constexpr std::int64_t kFour = 4;

Four load(const float* from) { return *reinterpret_cast<const Four*>(from); }
void store(float* to, Four values) { *reinterpret_cast<Four*>(to) = values; }

// Adds to all arrays at once. The loads come before the stores, because a processor may treat a load as dependent on an
// earlier store to the same offset in another page. Prefetches `ahead` bytes ahead; 0 is no prefetch.
template <std::int64_t ahead>
struct Together {
  template <std::size_t N>
  static void add(const Traffic& tensor, std::int64_t begin, std::int64_t end) {
    const float* const read = tensor.read;
    std::array<float*, N> updated;
    std::copy_n(tensor.updated.begin(), N, updated.begin());
    std::int64_t i = begin;
    for (; i + kFloatsInLine <= end; i += kFloatsInLine) {
      if constexpr (ahead > 0) {
        __builtin_prefetch(reinterpret_cast<const std::byte*>(read + i) + ahead);
        for (float* array : updated) __builtin_prefetch(reinterpret_cast<const std::byte*>(array + i) + ahead);
      }
      for (std::int64_t j = i; j < i + kFloatsInLine; j += kFour) {
        const Four x = load(read + j);
        Four sums[N];
        for (std::size_t k = 0; k < N; ++k) sums[k] = load(updated[k] + j) + x;
        for (std::size_t k = 0; k < N; ++k) store(updated[k] + j, sums[k]);
      }
    }
    for (; i < end; ++i)
      for (float* array : updated) array[i] += read[i];
  }

  template <std::size_t N>
  static float sum(const Traffic& tensor, std::int64_t begin, std::int64_t end) {
    std::array<const float*, N> measured;
    std::copy_n(tensor.measured.begin(), N, measured.begin());
    Four sums[kFloatsInLine / kFour] = {};
    float rest = 0.0F;
    std::int64_t i = begin;
    for (; i + kFloatsInLine <= end; i += kFloatsInLine) {
      for (const float* array : measured) {
        if constexpr (ahead > 0) __builtin_prefetch(reinterpret_cast<const std::byte*>(array + i) + ahead);
        for (std::int64_t j = 0; j < kFloatsInLine; j += kFour) sums[j / kFour] += load(array + i + j);
      }
    }
    for (; i < end; ++i)
      for (const float* array : measured) rest += array[i];
    for (const Four& four : sums) rest += four[0] + four[1] + four[2] + four[3];
    return rest;
  }
};

// Adds to one array after the other, in tiles of `tile` bytes.
template <std::int64_t tile>
struct InTiles {
  template <std::size_t N>
  static void add(const Traffic& tensor, std::int64_t begin, std::int64_t end) {
    constexpr std::int64_t elements = tile / std::int64_t{sizeof(float)};
    const float* const read = tensor.read;
    for (std::int64_t at = begin; at < end; at += elements) {
      const std::int64_t stop = std::min(at + elements, end);
      for (std::size_t k = 0; k < N; ++k) {
        float* const array = tensor.updated[k];
#pragma GCC ivdep
        for (std::int64_t i = at; i < stop; ++i) array[i] += read[i];
      }
    }
  }

  template <std::size_t N>
  static float sum(const Traffic& tensor, std::int64_t begin, std::int64_t end) {
    constexpr std::int64_t elements = tile / std::int64_t{sizeof(float)};
    float total = 0.0F;
    Traffic one{.length = tensor.length, .read = nullptr, .updated = {}, .measured = {nullptr}};
    for (std::int64_t at = begin; at < end; at += elements) {
      for (std::size_t k = 0; k < N; ++k) {
        one.measured[0] = tensor.measured[k];
        total += Together<0>::sum<1>(one, at, std::min(at + elements, end));
      }
    }
    return total;
  }
};

template <class Passes>
void add(const Traffic& tensor, std::int64_t begin, std::int64_t end) {
  [&]<std::size_t... I>(std::index_sequence<I...>) {
    ((tensor.updated.size() == I + 1 ? Passes::template add<I + 1>(tensor, begin, end) : void()), ...);
  }(std::make_index_sequence<kMaxUpdated>{});
}

template <class Passes>
float sum(const Traffic& tensor, std::int64_t begin, std::int64_t end) {
  float total = 0.0F;
  [&]<std::size_t... I>(std::index_sequence<I...>) {
    ((total += tensor.measured.size() == I + 1 ? Passes::template sum<I + 1>(tensor, begin, end) : 0.0F), ...);
  }(std::make_index_sequence<kMaxUpdated>{});
  return total;
}

template <class Passes>
constexpr Loop named(const char* name) {
  return {name, &add<Passes>, &sum<Passes>};
}

constexpr Loop kLoops[] = {
    named<Together<0>>("plain"),
    named<Together<512>>("prefetch_512"),
    named<Together<1024>>("prefetch_1024"),
    named<Together<2048>>("prefetch_2048"),
    named<InTiles<1024>>("tiles_1024"),
};

// Calls `visit` with each tensor, or part of one, in this thread's share of all elements.
template <class Visit>
void visit_share(std::span<const Traffic> tensors, std::int64_t total, Visit&& visit) {
  const std::int64_t share = total / omp_get_num_threads();
  const std::int64_t low = share * omp_get_thread_num();
  const std::int64_t high = omp_get_thread_num() + 1 == omp_get_num_threads() ? total : low + share;
  std::int64_t at = 0;
  for (const Traffic& tensor : tensors) {
    const std::int64_t begin = std::clamp(low - at, std::int64_t{0}, tensor.length);
    const std::int64_t end = std::clamp(high - at, std::int64_t{0}, tensor.length);
    if (begin < end) visit(tensor, begin, end);
    at += tensor.length;
  }
}

}  // namespace

std::span<const Loop> loops() { return kLoops; }

const Loop& find_loop(std::string_view name) {
  std::string known;
  for (const Loop& loop : kLoops) {
    if (name == loop.name) return loop;
    known += known.empty() ? "" : ", ";
    known += loop.name;
  }
  throw std::invalid_argument("unknown loop " + std::string(name) + "; there are: " + known);
}

float move_traffic(const Loop& loop, std::span<const Traffic> tensors, int threads) {
  std::int64_t total = 0;
  for (const Traffic& tensor : tensors) total += tensor.length;
  float measured = 0.0F;
#pragma omp parallel num_threads(threads) reduction(+ : measured)
  {
    visit_share(tensors, total, [&](const Traffic& tensor, std::int64_t begin, std::int64_t end) {
      if (!tensor.measured.empty()) measured += loop.sum(tensor, begin, end);
    });
    visit_share(tensors, total, loop.add);
  }
  return measured;
}

}  // namespace onepass
