// Sparse gradients: the rows of a parameter that they touch, and the entries of each row.
//
// A sparse gradient is a list of entries. The indices of an entry select one position in the first dimensions of the
// parameter. The elements of the remaining dimensions there, at least one, are called a row. The entry has a value for
// each element of the row. Several entries may have the same row; the gradient is their sum. The step adds them up
// (tile.h): it reads every value once and writes no coalesced gradient. This file sorts them.
#pragma once

#include <array>
#include <cstdint>
#include <span>
#include <vector>

namespace onepass {

// The indices of a sparse gradient: a matrix with a row for each dimension and a column for each entry.
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
  std::vector<Entry> entries;       // in the gradient's order; once coalesced, sorted by row and then by position
  std::vector<std::int64_t> first;  // once coalesced: the first entry of each touched row, and then the end

  // Returns the number of touched rows.
  std::int64_t count() const { return static_cast<std::int64_t>(first.size()) - 1; }
};

// Returns the entries of a gradient, not yet coalesced. `sizes` are those of the indexed dimensions, `length` is the
// length of a row. Throws std::out_of_range with a message that names the index if one is out of range.
Rows read_rows(const Indices& indices, std::span<const std::int64_t> sizes, std::int64_t length);

// Sorts the entries by row. The sort is stable, so the entries of a row are added in the gradient's order.
void coalesce(Rows& rows);

}  // namespace onepass
