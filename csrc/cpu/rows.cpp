#include "cpu/rows.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <utility>

namespace onepass {
namespace {

// Sorts entries by row: a stable radix sort, from the lowest digit.
void sort_by_row(std::vector<Rows::Entry>& entries) {
  constexpr int kDigitBits = 11;
  constexpr std::size_t kDigits = std::size_t{1} << kDigitBits;
  const std::int64_t largest = std::ranges::max(entries, {}, &Rows::Entry::row).row;
  std::vector<Rows::Entry> sorted(entries.size());
  for (int shift = 0; shift < 63 && largest >> shift != 0; shift += kDigitBits) {
    const auto digit = [shift](const Rows::Entry& entry) {
      return static_cast<std::size_t>(entry.row >> shift) & (kDigits - 1);
    };
    std::array<std::size_t, kDigits> place{};  // position of the next entry with this digit
    for (const Rows::Entry& entry : entries) ++place[digit(entry)];
    std::size_t before = 0;
    for (std::size_t& next : place) before += std::exchange(next, before);
    for (const Rows::Entry& entry : entries) sorted[place[digit(entry)]++] = entry;
    entries.swap(sorted);
  }
}

}  // namespace

Rows read_rows(const Indices& indices, std::span<const std::int64_t> sizes, std::int64_t length) {
  Rows rows{.length = length, .entries = {}, .first = {}};
  rows.entries.reserve(static_cast<std::size_t>(indices.entries));
  for (std::int64_t e = 0; e < indices.entries; ++e) {
    std::int64_t row = 0;
    for (std::size_t d = 0; d < sizes.size(); ++d) {
      const std::int64_t index = indices.at(d, e);
      if (index < 0 || index >= sizes[d])
        throw std::out_of_range("index " + std::to_string(index) + " of entry " + std::to_string(e) +
                                " is out of range for dimension " + std::to_string(d) + " of size " +
                                std::to_string(sizes[d]));
      row = row * sizes[d] + index;
    }
    rows.entries.push_back({row, e});
  }
  return rows;
}

void coalesce(Rows& rows) {
  if (!std::ranges::is_sorted(rows.entries, {}, &Rows::Entry::row)) sort_by_row(rows.entries);
  rows.first.clear();
  std::int64_t last = -1;
  for (std::size_t e = 0; e < rows.entries.size(); ++e)
    if (std::exchange(last, rows.entries[e].row) != rows.entries[e].row)
      rows.first.push_back(static_cast<std::int64_t>(e));
  rows.first.push_back(static_cast<std::int64_t>(rows.entries.size()));
}

}  // namespace onepass
