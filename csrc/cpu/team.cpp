#include "cpu/team.h"

#include <algorithm>
#include <atomic>

#include "fork.h"

namespace onepass {
namespace {

// Bytes that are worth another thread: some 75 thousand float32 elements of Adam, 30 us.
constexpr std::int64_t kBytesPerThread = std::int64_t{2} << 20;
std::atomic<std::int64_t> bytes_per_thread = kBytesPerThread;

}  // namespace

void force_bytes_per_thread(std::int64_t bytes) {
  bytes_per_thread.store(bytes > 0 ? bytes : kBytesPerThread, std::memory_order_relaxed);
}

int team_size(std::int64_t bytes, int threads) {
  // A forked child has none of its parent's OpenMP threads, and libgomp would wait for them without end.
  if (fork_count() > 0) return 1;
  const std::int64_t worth = bytes / bytes_per_thread.load(std::memory_order_relaxed);
  return static_cast<int>(std::max<std::int64_t>(1, std::min<std::int64_t>(threads, worth)));
}

}  // namespace onepass
