// One step of an optimizer at a time.
#pragma once

#include <memory>
#include <mutex>
#include <thread>

namespace onepass {

// A mutex whose waiters let go of the GIL, and which a forked child never finds locked by a thread that it does not
// have. Needs the GIL.
class StepMutex {
 public:
  StepMutex();

  // Throws std::runtime_error if this thread holds it already.
  void lock();
  void unlock();

 private:
  std::unique_ptr<std::mutex> mutex_;
  std::thread::id owner_;
  unsigned forks_;  // fork_count() when the mutex was last taken
};

using StepLock = std::lock_guard<StepMutex>;

}  // namespace onepass
