// How many threads a piece of work is given.
#pragma once

#include <cstdint>

namespace onepass {

// For work that moves this many bytes: at most `threads`, fewer where they would not be worth waking, and one in a
// forked child.
int team_size(int threads, std::int64_t bytes);

}  // namespace onepass
