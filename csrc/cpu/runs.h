// Divides a range of a strided operand or of sparse rows into runs of evenly spaced elements.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cpu/convert.h"
#include "cpu/rows.h"
#include "job.h"
#include "target.h"

namespace onepass::inline ONEPASS_TARGET {

// Returns the index, in the parameter, of touched row r.
inline std::int64_t row_number(const Rows& rows, std::int64_t r) {
  return rows.entries.data()[rows.first.data()[r]].row;
}

// Calls visit(offset, stride, count) for each run of elements [begin, begin + n) of an operand, in order. `offset` and
// `stride` are in elements. At most one of `rows` and `layout` is not null.
template <class Visit>
void for_each_run(const Rows* rows, const Layout* layout, std::size_t operand, std::int64_t begin, std::int64_t n,
                  Visit&& visit) {
  for (std::int64_t r = rows != nullptr ? begin / rows->length : 0; n > 0; ++r) {
    std::int64_t offset = begin;
    std::int64_t stride = 1;
    std::int64_t count = n;
    if (rows != nullptr) {
      const std::int64_t column = begin - r * rows->length;
      offset = row_number(*rows, r) * rows->length + column;
      if (rows->length - column < count) count = rows->length - column;
    } else if (layout != nullptr) {
      const auto inner = static_cast<std::int64_t>(layout->shape.size()) - 1;
      const std::int64_t* shape = layout->shape.data();
      const std::int64_t* strides = layout->strides[operand].data();
      std::int64_t rest = begin;
      offset = 0;
      stride = strides[inner];
      for (std::int64_t d = inner; d >= 0; --d) {
        const std::int64_t index = rest % shape[d];
        rest /= shape[d];
        offset += index * strides[d];
        if (d == inner && shape[d] - index < count) count = shape[d] - index;
      }
    }
    visit(offset, stride, count);
    begin += count;
    n -= count;
  }
}

// Copy elements [begin, begin + n) of an operand that is packed or has a layout to and from a tile.
template <class T>
void decode(const Operand& source, const Layout* layout, std::size_t operand, std::int64_t begin, std::int64_t n,
            T* tile) {
  for_each_run(nullptr, layout, operand, begin, n, [&](std::int64_t offset, std::int64_t stride, std::int64_t count) {
    read_run(source, offset, stride, tile, count);
    tile += count;
  });
}

template <class T>
void encode(const Operand& target, const Layout* layout, std::size_t operand, std::int64_t begin, std::int64_t n,
            const T* tile) {
  for_each_run(nullptr, layout, operand, begin, n, [&](std::int64_t offset, std::int64_t stride, std::int64_t count) {
    write_run(target, offset, stride, tile, count);
    tile += count;
  });
}

}  // namespace onepass::inline ONEPASS_TARGET
