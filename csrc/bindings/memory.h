// Tensors whose memory overlaps.
#pragma once

#include <cstddef>
#include <span>
#include <vector>

namespace onepass {

// Bytes that the step of a parameter writes.
struct MemoryRange {
  const std::byte* first = nullptr;
  const std::byte* past = nullptr;
  std::size_t owner = 0;  // the parameter's number

  bool empty() const { return first == past; }
};

// Two ranges that overlap: the one that begins later, and of those before it the one that reaches furthest. Both owners
// may be the same.
struct MemoryOverlap {
  std::size_t later, earlier;
};

// The overlaps of ranges, which it sorts: one at least of each range that overlaps one before it, in order of address.
std::vector<MemoryOverlap> find_overlaps(std::vector<MemoryRange>& ranges);

}  // namespace onepass
