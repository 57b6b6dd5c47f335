// Sparse gradients: which rows of a parameter they touch, and which of their entries add up to each.
//
// A sparse gradient is a list of entries. Its indices name a place in the first dimensions of the parameter; what the
// remaining ones span there, one element at least, is called a row, and the entry has a value for each of its elements.
// Several entries may name the same row: the gradient is their sum. Adding them up is left to the step (tile.h),
// which reads every value once and writes no coalesced gradient; here they are put in order.
#pragma once

#include <array>
#include <cstdint>
#include <span>
#include <vector>

namespace onepass {

// The indices of a sparse gradient: a matrix of a row for each dimension and a column for each entry.
struct Indices {
  const std::int64_t* data = nullptr;
  std::int64_t entries = 0;
  std::array<std::int64_t, 2> strides{};

  std::int64_t at(std::size_t dimension, std::int64_t entry) const {
    return data[static_cast<std::int64_t>(dimension) * strides[0] + entry * strides[1]];
  }
};

struct Rows {
  struct Entry {
    std::int64_t row;       // of the parameter
    std::int64_t position;  // among the gradient's entries
  };

  std::int64_t length = 0;          // elements in a row
  std::vector<Entry> entries;       // as they come; once coalesced by row, and those of one row by position
  std::vector<std::int64_t> first;  // once coalesced: the first entry of each touched row, and behind it the end

  // Touched rows.
  std::int64_t count() const { return static_cast<std::int64_t>(first.size()) - 1; }
};

// The entries of a gradient whose indices are for dimensions of these sizes, not yet coalesced. Throws
// std::out_of_range, with a message that names the index, if one lies outside.
Rows read_rows(const Indices& indices, std::span<const std::int64_t> sizes, std::int64_t length);

// Brings the entries of each row together: a stable sort, so that they are added in the order in which they came.
void coalesce(Rows& rows);

}  // namespace onepass
