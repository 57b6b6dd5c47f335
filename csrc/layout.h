// Strides: the fewest dimensions that describe several operands at once, and the questions asked of a single tensor.
#pragma once

#include <cstdint>
#include <span>

#include "job.h"

namespace onepass {

// The layout of operands of one shape, with dimensions ordered by the parameter's strides, those of size 1 dropped, and
// neighbours merged where every operand allows it. `strides[k]` may be empty: operand k is absent.
Layout make_layout(std::span<const std::int64_t> shape,
                   const std::array<std::span<const std::int64_t>, kMaxOperands>& strides);

// Whether under this layout all operands are packed in the same order, so that none is needed.
bool is_flat(const Layout& layout);

// Whether a tensor is packed with its last dimension innermost.
bool is_row_major(std::span<const std::int64_t> shape, std::span<const std::int64_t> strides);

// Whether two elements of one tensor may share memory: no, certainly (a dimension of stride 0), or perhaps (strides
// that interleave, as only as_strided makes them).
enum class Overlap { none, certain, possible };
Overlap self_overlap(std::span<const std::int64_t> shape, std::span<const std::int64_t> strides);

// Elements from the first to the last in memory, both included.
std::int64_t extent(std::span<const std::int64_t> shape, std::span<const std::int64_t> strides);

}  // namespace onepass
