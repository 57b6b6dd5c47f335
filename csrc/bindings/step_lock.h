// Allows one step of an optimizer at a time.
#pragma once

#include <memory>
#include <mutex>
#include <thread>

namespace onepass {

// A mutex that releases the GIL while it waits. In a forked child, it is not locked by a thread that exists only in the
// parent. Needs the GIL.
class StepMutex {
 public:
  StepMutex();

  // Throws std::runtime_error if this thread has locked it already.
  void lock();
  void unlock();

 private:
  std::unique_ptr<std::mutex> mutex_;
  std::thread::id owner_;
  unsigned forks_;  // fork_count() when the mutex was last locked
};

using StepLock = std::scoped_lock<StepMutex>;

}  // namespace onepass
