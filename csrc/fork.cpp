#include "fork.h"

#include <pthread.h>

#include <atomic>

namespace onepass {
namespace {

std::atomic<unsigned> count{0};
std::thread::id survivor;  // written while the child has a single thread

[[maybe_unused]] const int registered = pthread_atfork(nullptr, nullptr, [] {
  survivor = std::this_thread::get_id();
  ++count;
});

}  // namespace

unsigned fork_count() { return count; }

std::thread::id fork_survivor() { return survivor; }

}  // namespace onepass
