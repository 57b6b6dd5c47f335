// Forks. A forked child has none of its parent's other threads.
#pragma once

#include <thread>

namespace onepass {

// The number of forks between this process and the one that loaded onepass.
unsigned fork_count();

// In a forked child, the thread that survived the last fork: the one that called it.
std::thread::id fork_survivor();

}  // namespace onepass
