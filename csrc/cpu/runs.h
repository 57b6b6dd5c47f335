// Divides a range of a strided operand or of sparse rows into runs of evenly spaced elements.
#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>
#include <vector>

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

// The run of an operand that contains an element. A run of a layout covers all trailing dimensions in which this
// operand has one stride, also if other operands have several there; one of rows is the rest of a row.
class Run {
 public:
  // At most one of `rows` and `layout` is not null.
  Run(const Rows* rows, const Layout* layout, std::size_t operand, std::int64_t element)
      : rows_(rows), layout_(layout), operand_(operand) {
    find(element);
  }

  std::int64_t offset() const { return offset_; }  // of the element, in elements
  std::int64_t stride() const { return stride_; }
  std::int64_t count() const { return length_ - place_; }  // from the element to the end of the run

  // Goes on to the next run, which begins with this element.
  void next(std::int64_t element) {
    if (--runs_ == 0) return find(element);
    offset_ += step_ - place_ * stride_;
    place_ = 0;
  }

 private:
  // Not inlined: it divides, and is called once for all runs along a dimension.
  [[gnu::noinline]] void find(std::int64_t element) {
    place_ = 0;
    runs_ = 1;
    if (rows_ != nullptr) {
      const std::int64_t row = element / rows_->length;
      length_ = rows_->length;
      place_ = element - row * length_;
      offset_ = row_number(*rows_, row) * length_ + place_;
    } else if (layout_ == nullptr) {
      offset_ = element;
      length_ = std::numeric_limits<std::int64_t>::max();
    } else {
      const std::int64_t* const shape = layout_->shape.data();
      const std::int64_t* const strides = layout_->strides[operand_].data();
      std::int64_t outer = std::ssize(layout_->shape) - 1;  // the dimensions before it are not in the run
      stride_ = strides[outer];
      length_ = shape[outer];
      for (; outer > 0 && strides[outer - 1] == stride_ * length_; --outer) length_ *= shape[outer - 1];
      std::int64_t index = element / length_;
      place_ = element - index * length_;
      offset_ = place_ * stride_;
      if (outer == 0) return;
      step_ = strides[outer - 1];
      runs_ = shape[outer - 1] - index % shape[outer - 1];
      for (std::int64_t d = outer - 1; d >= 0; --d) {
        offset_ += index % shape[d] * strides[d];
        index /= shape[d];
      }
    }
  }

  const Rows* rows_;
  const Layout* layout_;
  std::size_t operand_;
  std::int64_t offset_ = 0;
  std::int64_t stride_ = 1;
  std::int64_t length_ = 0;
  std::int64_t place_ = 0;  // in the run
  std::int64_t runs_ = 1;   // from this one to the last along the dimension around it
  std::int64_t step_ = 0;   // the stride of that dimension
};

// Calls visit(offset, stride, count) for each run of elements [begin, begin + n) of an operand, in order. `offset` and
// `stride` are in elements. At most one of `rows` and `layout` is not null.
template <class Visit>
void for_each_run(const Rows* rows, const Layout* layout, std::size_t operand, std::int64_t begin, std::int64_t n,
                  Visit&& visit) {
  if (n <= 0) return;
  Run run(rows, layout, operand, begin);
  for (const std::int64_t end = begin + n;;) {
    const std::int64_t count = run.count() < end - begin ? run.count() : end - begin;
    visit(run.offset(), run.stride(), count);
    begin += count;
    if (begin == end) return;
    run.next(begin);
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
