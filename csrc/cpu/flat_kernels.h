// The passes of cpu/flat.h over one chunk, in tiles that stay in the L1 cache. Products and sums are formed in double:
// beside reading the history this takes no time, products of float32 values are exact, and they cannot overflow.
#pragma once

#include <bit>
#include <cstdint>
#include <type_traits>

#include "cpu/convert.h"
#include "cpu/flat.h"
#include "cpu/runs.h"
#include "cpu/sums.h"
#include "rules/math.h"
#include "target.h"

namespace onepass::inline ONEPASS_TARGET {

// Returns where to write elements of a flat vector from `at` on: in place if it is a plain array, else `room`.
template <class T>
T* place(const Operand& vector, std::int64_t at, T* room) {
  return is_plain_array<T>(vector) ? reinterpret_cast<T*>(vector.data) + at : room;
}

// Returns elements [at, at + n) of a flat vector: in place if it is a plain array, else decoded into `room`.
template <class T>
const T* load(const Operand& vector, std::int64_t at, std::int64_t n, T* room) {
  T* tile = place(vector, at, room);
  if (tile == room) decode(vector, nullptr, Part::kFlat, at, n, room);
  return tile;
}

// Encodes the elements that were written to `place(vector, at, room)`, if that was `room`.
template <class T>
void store(const Operand& vector, std::int64_t at, std::int64_t n, const T* room, const T* tile) {
  if (tile == room) encode(vector, nullptr, Part::kFlat, at, n, tile);
}

template <class T>
const double* widened(const T* tile, std::int64_t n, double* room) {
  if constexpr (std::is_same_v<T, double>) {
    return tile;
  } else {
    for (std::int64_t i = 0; i < n; ++i) room[i] = static_cast<double>(tile[i]);
    return room;
  }
}

template <class T>
ONEPASS_INLINE double dot(const T* a, const double* b, std::int64_t n) {
  return sum_of<double>(n, [&](std::int64_t i) { return static_cast<double>(a[i]) * b[i]; });
}

// Prefetches `Count` elements one tile ahead. The history is many vectors, read one tile at a time, and the hardware
// prefetcher would start again in each tile. Inlined, because gcc removes a call to a function that only prefetches.
template <std::int64_t Count, class T>
ONEPASS_INLINE void fetch_ahead(const T* elements) {
  const auto* from = reinterpret_cast<const std::byte*>(elements) + kSumTile * sizeof(T);
  for (std::size_t at = 0; at < Count * sizeof(T); at += 64) __builtin_prefetch(from + at, 0, 2);
}

// Calls visit(part, from, n, to) for all parts of [begin, begin + n): elements [from, from + n) of the part are at `to`
// in that range.
template <class Visit>
ONEPASS_INLINE void for_each_part(std::span<const Part> parts, std::int64_t begin, std::int64_t n, Visit&& visit) {
  std::size_t first = 0;  // the first part that ends after `begin`
  for (std::size_t past = parts.size(); first < past;) {
    const std::size_t middle = (first + past) / 2;
    if (parts[middle].begin + parts[middle].length <= begin) {
      first = middle + 1;
    } else {
      past = middle;
    }
  }
  for (std::size_t k = first; k < parts.size() && parts[k].begin < begin + n; ++k) {
    const Part& part = parts[k];
    const std::int64_t low = part.begin > begin ? part.begin : begin;
    const std::int64_t high = part.begin + part.length < begin + n ? part.begin + part.length : begin + n;
    if (low < high) visit(part, low - part.begin, high - low, low - begin);
  }
}

template <class Storage>
void copy_run(const std::byte* from, std::int64_t from_stride, std::byte* to, std::int64_t to_stride, std::int64_t n) {
  using Stored = typename Unaligned<Storage>::type;
  const auto* source = reinterpret_cast<const Stored*>(from);
  auto* target = reinterpret_cast<Stored*>(to);
  if (from_stride == 1 && to_stride == 1) {
    for (std::int64_t i = 0; i < n; ++i) target[i] = source[i];
  } else {
    for (std::int64_t i = 0; i < n; ++i) target[i * to_stride] = source[i * from_stride];
  }
}

// Copies elements [from, from + n) of a part to a packed array of its format, or back, with all bits: denormals, too.
enum class Way { out_of_tensor, into_tensor };
template <Way way>
void copy_part(const Part& part, std::int64_t from, std::int64_t n, std::byte* packed) {
  const auto size = static_cast<std::int64_t>(size_of(part.tensor.format));
  for_each_run(nullptr, part.layout, Part::kTensor, from, n,
               [&](std::int64_t offset, std::int64_t stride, std::int64_t count) {
                 std::byte* const own = part.tensor.data + offset * size;
                 const auto copy = [&]<class Storage>(Storage) {
                   way == Way::out_of_tensor ? copy_run<Storage>(own, stride, packed, 1, count)
                                             : copy_run<Storage>(packed, 1, own, stride, count);
                 };
                 size == 2 ? copy(std::uint16_t{}) : size == 4 ? copy(std::uint32_t{}) : copy(std::uint64_t{});
                 packed += count * size;
               });
}

template <class Visit>
ONEPASS_INLINE void for_each_tile(const Chunk& chunk, Visit&& visit) {
  for (std::int64_t at = chunk.begin; at < chunk.end; at += kSumTile)
    visit(at, chunk.end - at < kSumTile ? chunk.end - at : kSumTile);
}

template <class T>
void gather(const Gather& pass, const Chunk& chunk, double* sums, double& largest) {
  alignas(64) T rooms[2][kSumTile];
  alignas(64) double wide[kSumTile];
  const auto size = static_cast<std::int64_t>(size_of(pass.out.format));
  for_each_tile(chunk, [&](std::int64_t at, std::int64_t n) {
    for_each_part(pass.parts, at, n, [&](const Part& part, std::int64_t from, std::int64_t count, std::int64_t to) {
      std::byte* const out = pass.out.data + (at + to) * size;
      if (part.tensor.data == nullptr) {
        for (std::int64_t i = 0; i < count * size; ++i) out[i] = std::byte{0};
      } else if (part.tensor.format == pass.out.format) {
        copy_part<Way::out_of_tensor>(part, from, count, out);
      } else {
        decode(part.tensor, part.layout, Part::kTensor, from, count, rooms[0]);
        encode(pass.out, nullptr, Part::kFlat, at + to, count, rooms[0]);
      }
    });
    const T* out = load(pass.out, at, n, rooms[0]);
    largest = maximum(largest, largest_of(out, n));
    if (pass.direction.data != nullptr) sums[0] += dot(out, widened(load(pass.direction, at, n, rooms[1]), n, wide), n);
  });
}

template <class T>
void distance(const Distance& pass, const Chunk& chunk, double* sums, double& /*largest*/) {
  alignas(64) T rooms[2][kSumTile];
  for_each_tile(chunk, [&](std::int64_t at, std::int64_t n) {
    for_each_part(pass.parts, at, n, [&](const Part& part, std::int64_t from, std::int64_t count, std::int64_t to) {
      decode(part.tensor, part.layout, Part::kTensor, from, count, rooms[0] + to);
    });
    const auto add = [&](auto&& difference) {
      sums[0] += sum_of<double>(n, [&](std::int64_t i) {
        const double d = difference(i);
        return d * d;
      });
    };
    const T* x = rooms[0];
    if (pass.from.data == nullptr) return add([&](std::int64_t i) { return static_cast<double>(x[i]); });
    const T* from = load(pass.from, at, n, rooms[1]);
    add([&](std::int64_t i) { return static_cast<double>(x[i]) - static_cast<double>(from[i]); });
  });
}

template <class T>
void move(const Move& pass, const Chunk& chunk, double* /*sums*/, double& /*largest*/) {
  alignas(64) T rooms[3][kSumTile];
  const T step = static_cast<T>(pass.step);
  for_each_tile(chunk, [&](std::int64_t at, std::int64_t n) {
    const T* direction = step != T(0) ? load(pass.direction, at, n, rooms[0]) : nullptr;
    for_each_part(pass.parts, at, n, [&](const Part& part, std::int64_t from, std::int64_t count, std::int64_t to) {
      const Operand own{pass.x.data + part.begin * static_cast<std::int64_t>(size_of(pass.x.format)),
                        part.tensor.format};
      std::byte* const kept = own.data + from * static_cast<std::int64_t>(size_of(own.format));
      if (pass.keep) copy_part<Way::out_of_tensor>(part, from, count, kept);
      if (step == T(0)) return copy_part<Way::into_tensor>(part, from, count, kept);
      const T* x = load(own, from, count, rooms[1]);
      for (std::int64_t i = 0; i < count; ++i) rooms[2][i] = x[i] + step * direction[to + i];
      encode(part.tensor, part.layout, Part::kTensor, from, count, rooms[2]);
    });
  });
}

template <class T>
void write_pair(const Products& pass, std::int64_t at, std::int64_t n) {
  alignas(64) T rooms[3][kSumTile];
  alignas(64) T results[2][kSumTile];
  const T step = static_cast<T>(pass.step);
  const T* gradient = load(pass.gradient, at, n, rooms[0]);
  const T* previous = load(pass.previous, at, n, rooms[1]);
  const T* direction = load(pass.direction, at, n, rooms[2]);
  const Pair& pair = pass.pairs.back();
  T* s = place(pair.s, at, results[0]);
  T* y = place(pair.y, at, results[1]);
#pragma GCC ivdep
  for (std::int64_t i = 0; i < n; ++i) {
    s[i] = step * direction[i];
    y[i] = gradient[i] - previous[i];
  }
  store(pair.s, at, n, results[0], s);
  store(pair.y, at, n, results[1], y);
}

template <class T>
void products(const Products& pass, const Chunk& chunk, double* sums, double& /*largest*/) {
  alignas(64) T rooms[4][kSumTile];
  alignas(64) double wide[2][kSumTile];
  for_each_tile(chunk, [&](std::int64_t at, std::int64_t n) {
    if (pass.previous.data != nullptr) write_pair<T>(pass, at, n);
    // Read back what was written, which is rounded in a 16-bit format.
    const double* y = widened(load(pass.pairs.back().y, at, n, rooms[0]), n, wide[0]);
    const double* g = widened(load(pass.gradient, at, n, rooms[1]), n, wide[1]);
    double* found = sums;
    for (const Pair& pair : pass.pairs) {
      const T* pair_s = load(pair.s, at, n, rooms[2]);
      const T* pair_y = load(pair.y, at, n, rooms[3]);
      add_sums_of<double>(
          n, found,
          [&](std::int64_t i) __attribute__((always_inline)) {
            fetch_ahead<kSumLanes>(pair_s + i);
            fetch_ahead<kSumLanes>(pair_y + i);
          },
          [&](std::int64_t i) { return static_cast<double>(pair_s[i]) * y[i]; },
          [&](std::int64_t i) { return static_cast<double>(pair_y[i]) * y[i]; },
          [&](std::int64_t i) { return static_cast<double>(pair_s[i]) * g[i]; },
          [&](std::int64_t i) { return static_cast<double>(pair_y[i]) * g[i]; });
      found += Products::sums;
    }
  });
}

template <class T>
void combine(const Combine& pass, const Chunk& chunk, double* sums, double& largest) {
  alignas(64) T rooms[2][kSumTile];
  alignas(64) T result[kSumTile];
  alignas(64) double wide[kSumTile];
  alignas(64) double total[kSumTile];
  constexpr std::int64_t kRun = 64;
  const Combine::Factors& factors = pass.factors[chunk.group];
  for_each_tile(chunk, [&](std::int64_t at, std::int64_t n) {
    const T* gradient = load(pass.gradient, at, n, rooms[0]);
    for (std::int64_t i = 0; i < n; ++i) total[i] = factors.of_gradient * static_cast<double>(gradient[i]);
    for (std::size_t k = 0; k < pass.pairs.size(); ++k) {
      const T* s = load(pass.pairs[k].s, at, n, rooms[0]);
      const T* y = load(pass.pairs[k].y, at, n, rooms[1]);
      const double of_s = factors.of_s[k];
      const double of_y = factors.of_y[k];
      const auto add = [&](std::int64_t i) {
        total[i] = (total[i] + of_s * static_cast<double>(s[i])) + of_y * static_cast<double>(y[i]);
      };
      std::int64_t i = 0;
      for (; i + kRun <= n; i += kRun) {
        fetch_ahead<kRun>(s + i);
        fetch_ahead<kRun>(y + i);
        for (std::int64_t j = 0; j < kRun; ++j) add(i + j);
      }
      for (; i < n; ++i) add(i);
    }
    T* out = place(pass.out, at, result);
    for (std::int64_t i = 0; i < n; ++i) out[i] = static_cast<T>(total[i]);
    store(pass.out, at, n, result, out);
    out = const_cast<T*>(load(pass.out, at, n, result));  // as it is stored
    gradient = load(pass.gradient, at, n, rooms[0]);
    sums[0] += dot(out, widened(gradient, n, wide), n);
    sums[1] += sum_of<double>(n, [&](std::int64_t i) { return magnitude(static_cast<double>(out[i])); });
    largest = maximum(largest, largest_of(out, n));
  });
}

}  // namespace onepass::inline ONEPASS_TARGET
