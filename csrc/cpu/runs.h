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

// Whether an operand with a layout is packed in the order of the job's elements. An absent operand is not.
inline bool is_packed(const Layout& layout, std::size_t operand) {
  const std::vector<std::int64_t>& strides = layout.strides[operand];
  std::int64_t packed = 1;
  for (std::size_t d = strides.size(); d-- > 0; packed *= layout.shape.data()[d])
    if (strides.data()[d] != packed) return false;
  return !strides.empty();
}

// Calls visit(offset, stride, count) for each run of elements [begin, begin + n) of an operand with a layout, in order.
// A run covers all trailing dimensions in which this operand has one stride, also if other operands have several there.
template <class Visit>
void for_each_run_of_layout(const Layout& layout, std::size_t operand, std::int64_t begin, std::int64_t n,
                            Visit&& visit) {
  const std::int64_t* const shape = layout.shape.data();
  const std::int64_t* const strides = layout.strides[operand].data();
  std::int64_t outer = std::ssize(layout.shape) - 1;  // the dimensions before `outer` are outside of the run
  const std::int64_t stride = strides[outer];
  std::int64_t length = shape[outer];
  for (; outer > 0 && strides[outer - 1] == stride * length; --outer) length *= shape[outer - 1];
  while (n > 0) {
    std::int64_t run = begin / length;
    std::int64_t place = begin - run * length;  // in the run
    std::int64_t offset = place * stride;
    std::int64_t runs = 1;  // up to the end of the dimension around the run: divisions are slow
    if (outer > 0) {
      runs = shape[outer - 1] - run % shape[outer - 1];
      for (std::int64_t d = outer - 1; d >= 0; --d) {
        offset += run % shape[d] * strides[d];
        run /= shape[d];
      }
    }
    for (; runs > 0 && n > 0; --runs) {
      const std::int64_t count = length - place < n ? length - place : n;
      visit(offset, stride, count);
      begin += count;
      n -= count;
      if (outer > 0) offset += strides[outer - 1] - place * stride;
      place = 0;
    }
  }
}

// Calls visit(offset, stride, count) for each run of elements [begin, begin + n) of an operand, in order. `offset` and
// `stride` are in elements. At most one of `rows` and `layout` is not null.
template <class Visit>
void for_each_run(const Rows* rows, const Layout* layout, std::size_t operand, std::int64_t begin, std::int64_t n,
                  Visit&& visit) {
  if (layout != nullptr) return for_each_run_of_layout(*layout, operand, begin, n, visit);
  if (rows == nullptr) return n > 0 ? visit(begin, std::int64_t{1}, n) : void();
  for (std::int64_t r = begin / rows->length; n > 0; ++r) {
    const std::int64_t column = begin - r * rows->length;
    const std::int64_t count = rows->length - column < n ? rows->length - column : n;
    visit(row_number(*rows, r) * rows->length + column, std::int64_t{1}, count);
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
