#include "layout.h"

#include <algorithm>
#include <numeric>

namespace onepass {

Layout make_layout(std::span<const std::int64_t> shape,
                   const std::array<std::span<const std::int64_t>, kMaxOperands>& strides, std::size_t order) {
  std::vector<std::size_t> dimensions;
  for (std::size_t d = 0; d < shape.size(); ++d)
    if (shape[d] != 1) dimensions.push_back(d);
  std::ranges::stable_sort(dimensions,
                           [&](std::size_t a, std::size_t b) { return strides[order][a] > strides[order][b]; });

  Layout layout;
  for (const std::size_t d : dimensions) {
    const bool merges = !layout.shape.empty() && [&] {
      for (std::size_t k = 0; k < strides.size(); ++k)
        if (!strides[k].empty() && layout.strides[k].back() != strides[k][d] * shape[d]) return false;
      return true;
    }();
    if (merges) {
      layout.shape.back() *= shape[d];
    } else {
      layout.shape.push_back(shape[d]);
    }
    for (std::size_t k = 0; k < strides.size(); ++k) {
      if (strides[k].empty()) continue;
      if (merges) {
        layout.strides[k].back() = strides[k][d];
      } else {
        layout.strides[k].push_back(strides[k][d]);
      }
    }
  }
  return layout;
}

bool is_flat(const Layout& layout) {
  if (std::ranges::find(layout.shape, 0) != layout.shape.end() || layout.shape.empty()) return true;
  return layout.shape.size() == 1 &&
         std::ranges::all_of(layout.strides, [](const auto& s) { return s.empty() || s.front() == 1; });
}

bool is_row_major(std::span<const std::int64_t> shape, std::span<const std::int64_t> strides) {
  if (std::ranges::find(shape, 0) != shape.end()) return true;
  std::int64_t packed = 1;
  for (std::size_t d = shape.size(); d-- > 0; packed *= shape[d])
    if (shape[d] != 1 && strides[d] != packed) return false;
  return true;
}

Overlap self_overlap(std::span<const std::int64_t> shape, std::span<const std::int64_t> strides) {
  if (std::ranges::find(shape, 0) != shape.end()) return Overlap::none;
  std::vector<std::size_t> order(shape.size());
  std::iota(order.begin(), order.end(), 0);
  std::ranges::sort(order, {}, [&](std::size_t d) { return strides[d]; });
  std::int64_t span = 1;  // elements covered by the dimensions of smaller strides
  Overlap overlap = Overlap::none;
  for (const std::size_t d : order) {
    if (shape[d] == 1) continue;
    if (strides[d] == 0) return Overlap::certain;
    if (strides[d] < span) overlap = Overlap::possible;
    span += strides[d] * (shape[d] - 1);
  }
  return overlap;
}

std::int64_t extent(std::span<const std::int64_t> shape, std::span<const std::int64_t> strides) {
  std::int64_t last = 0;
  for (std::size_t d = 0; d < shape.size(); ++d) {
    if (shape[d] == 0) return 0;
    last += strides[d] * (shape[d] - 1);
  }
  return last + 1;
}

}  // namespace onepass
