#include "overlap.h"

#include <algorithm>
#include <numeric>

namespace onepass {
namespace {

// The elements of a range as groups that repeat at a distance of `pitch`: the smallest strides form a group, the others
// repeat it.
struct Groups {
  std::int64_t width;  // bytes from the first to the last of a group
  std::int64_t pitch;  // divides all distances between groups; 0: there is one group
};

Groups groups_of(const MemoryRange& range, std::int64_t least_pitch) {
  if (range.spacing == nullptr) return {.width = range.past - range.first, .pitch = 0};
  Groups groups{.width = range.spacing->element, .pitch = 0};
  for (const auto& [size, stride] : range.spacing->dims) {
    if (stride < least_pitch) {
      groups.width += (size - 1) * stride;
    } else {
      groups.pitch = std::gcd(groups.pitch, stride);
    }
  }
  return groups;
}

// Whether the groups of `a`, repeated without end, leave gaps into which those of `b` fit.
bool fit_together(const MemoryRange& a, const MemoryRange& b, std::int64_t least_pitch) {
  const Groups of_a = groups_of(a, least_pitch);
  const Groups of_b = groups_of(b, least_pitch);
  const std::int64_t pitch = std::gcd(of_a.pitch, of_b.pitch);
  const std::int64_t distance = ((b.first - a.first) % pitch + pitch) % pitch;
  return distance >= of_a.width && distance + of_b.width <= pitch;
}

}  // namespace

Spacing spacing_of(std::span<const std::int64_t> shape, std::span<const std::int64_t> strides, std::size_t element) {
  const auto bytes = static_cast<std::int64_t>(element);
  Spacing spacing{.element = bytes, .dims = {}};
  for (std::size_t d = 0; d < shape.size(); ++d)
    if (shape[d] > 1 && strides[d] != 0) spacing.dims.emplace_back(shape[d], strides[d] * bytes);
  return spacing;
}

bool overlap(const MemoryRange& a, const MemoryRange& b) {
  if (a.first >= b.past || b.first >= a.past) return false;
  for (const Spacing* spacing : {a.spacing, b.spacing})
    if (spacing != nullptr)
      for (const auto& [size, stride] : spacing->dims)
        if (fit_together(a, b, stride)) return false;
  return true;
}

std::vector<MemoryOverlap> find_overlaps(std::vector<MemoryRange>& ranges) {
  std::ranges::stable_sort(ranges, {}, &MemoryRange::first);
  std::vector<MemoryOverlap> overlaps;
  std::vector<const MemoryRange*> open;  // earlier ranges that end after the next one begins
  for (const MemoryRange& range : ranges) {
    if (range.empty()) continue;
    std::erase_if(open, [&](const MemoryRange* other) { return other->past <= range.first; });
    for (const MemoryRange* other : open)
      if (overlap(*other, range)) overlaps.push_back({range.owner, other->owner});
    open.push_back(&range);
  }
  return overlaps;
}

}  // namespace onepass
