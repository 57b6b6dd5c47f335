#include "bindings/memory.h"

#include <algorithm>

namespace onepass {

std::vector<MemoryOverlap> find_overlaps(std::vector<MemoryRange>& ranges) {
  std::ranges::stable_sort(ranges, {}, &MemoryRange::first);
  std::vector<MemoryOverlap> overlaps;
  const MemoryRange* furthest = nullptr;  // of those so far, the one that reaches furthest
  for (const MemoryRange& range : ranges) {
    if (range.empty()) continue;
    if (furthest != nullptr && range.first < furthest->past) overlaps.push_back({range.owner, furthest->owner});
    if (furthest == nullptr || range.past > furthest->past) furthest = &range;
  }
  return overlaps;
}

}  // namespace onepass
