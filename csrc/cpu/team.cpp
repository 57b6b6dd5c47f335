#include "cpu/team.h"

#include <algorithm>

#include "fork.h"

namespace onepass {
namespace {

// Bytes that are worth another thread: some 75 thousand float32 elements of Adam, 30 us.
constexpr std::int64_t kBytesPerThread = std::int64_t{2} << 20;

}  // namespace

int team_size(std::int64_t bytes, int threads) {
  // A forked child has none of its parent's OpenMP threads, and libgomp would wait for them without end.
  if (fork_count() > 0) return 1;
  return static_cast<int>(std::max<std::int64_t>(1, std::min<std::int64_t>(threads, bytes / kBytesPerThread)));
}

}  // namespace onepass
