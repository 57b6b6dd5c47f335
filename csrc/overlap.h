// Tensors whose memory overlaps.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <utility>
#include <vector>

namespace onepass {

// How the elements of a tensor lie in memory where there are gaps between them, as in a column of a matrix. In bytes.
struct Spacing {
  std::int64_t element = 0;                                 // size of one
  std::vector<std::pair<std::int64_t, std::int64_t>> dims;  // size and stride of each that has more than one

  bool operator==(const Spacing&) const = default;
};

// `strides` count elements.
Spacing spacing_of(std::span<const std::int64_t> shape, std::span<const std::int64_t> strides, std::size_t element);

// Bytes that the step of a parameter reads or writes.
struct MemoryRange {
  const std::byte* first = nullptr;
  const std::byte* past = nullptr;
  std::size_t owner = 0;             // the parameter's number
  const Spacing* spacing = nullptr;  // null: there are no gaps

  bool empty() const { return first == past; }
};

// Whether two ranges have a byte in common. False for tensors whose elements lie in each other's gaps, as the columns
// of a matrix do, and the real and imaginary parts of complex numbers; of stranger ones it may be true without need.
bool overlap(const MemoryRange& a, const MemoryRange& b);

// The owners of two ranges that overlap, which may be the same. `later` has the range that begins later.
struct MemoryOverlap {
  std::size_t later, earlier;
};

// Sorts the ranges by address, and returns all overlaps.
std::vector<MemoryOverlap> find_overlaps(std::vector<MemoryRange>& ranges);

}  // namespace onepass
