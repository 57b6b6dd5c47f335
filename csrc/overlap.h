// Tensors whose memory overlaps.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <utility>
#include <vector>

namespace onepass {

// Sizes and strides, in bytes, of a tensor with gaps between its elements, such as a column of a matrix.
struct Spacing {
  std::int64_t element = 0;  // size of one
  std::vector<std::pair<std::int64_t, std::int64_t>>
      dims;  // size and stride of each dimension with size > 1 and stride > 0

  bool operator==(const Spacing&) const = default;
};

// `strides` are in elements, and `element` is the size of one in bytes.
Spacing spacing_of(std::span<const std::int64_t> shape, std::span<const std::int64_t> strides, std::size_t element);

// A range of memory that the step of a parameter reads or writes.
struct MemoryRange {
  const std::byte* first = nullptr;
  const std::byte* past = nullptr;
  std::size_t owner = 0;             // the parameter's number
  const Spacing* spacing = nullptr;  // null: there are no gaps

  bool empty() const { return first == past; }
};

// Whether two ranges have a byte in common. False for tensors whose elements lie in each other's gaps, such as the
// columns of a matrix, or the real and imaginary parts of complex numbers. It may be true for other strides that do not
// overlap.
bool overlap(const MemoryRange& a, const MemoryRange& b);

// The owners of two ranges that overlap, which may be the same. `later` has the range that begins later.
struct MemoryOverlap {
  std::size_t later, earlier;
};

// Sorts the ranges by address and returns all overlaps.
std::vector<MemoryOverlap> find_overlaps(std::vector<MemoryRange>& ranges);

}  // namespace onepass
