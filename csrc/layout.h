// Strides: the layout of several operands in the fewest dimensions, and properties of a single tensor.
#pragma once

#include <cstdint>
#include <span>

#include "job.h"

namespace onepass {

// Returns the layout of operands of one shape. Dimensions are ordered by the strides of operand `order`, those of size
// 1 are dropped, and neighbours are merged where every operand allows it. If `strides[k]` is empty, operand k is
// absent.
Layout make_layout(std::span<const std::int64_t> shape,
                   const std::array<std::span<const std::int64_t>, kMaxOperands>& strides, std::size_t order = kParam);

// Whether all operands of this layout are packed in the same order, so that a job does not need it.
bool is_flat(const Layout& layout);

// Whether a tensor is packed with its last dimension innermost.
bool is_row_major(std::span<const std::int64_t> shape, std::span<const std::int64_t> strides);

// Whether two elements of one tensor share memory: none do, certain (a dimension of stride 0), or possible (interleaved
// strides, which only as_strided makes).
enum class Overlap { none, certain, possible };
Overlap self_overlap(std::span<const std::int64_t> shape, std::span<const std::int64_t> strides);

// Returns the number of elements from the first to the last in memory, both included.
std::int64_t extent(std::span<const std::int64_t> shape, std::span<const std::int64_t> strides);

}  // namespace onepass
