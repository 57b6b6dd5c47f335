// Tensors whose memory overlaps.
#pragma once

#include <cstddef>
#include <vector>

namespace onepass {

// Bytes that the step of a parameter writes.
struct MemoryRange {
  const std::byte* first = nullptr;
  const std::byte* past = nullptr;
  std::size_t owner = 0;  // the parameter's number

  bool empty() const { return first == past; }
};

// The owners of two ranges that overlap, which may be the same. `later` has the range that begins later.
struct MemoryOverlap {
  std::size_t later, earlier;
};

// Sorts the ranges by address. Returns at least one overlap for each range that overlaps an earlier one.
std::vector<MemoryOverlap> find_overlaps(std::vector<MemoryRange>& ranges);

}  // namespace onepass
