#include "bindings/step_lock.h"

#include <pybind11/pybind11.h>

#include <stdexcept>
#include <utility>

#include "fork.h"

namespace py = pybind11;

namespace onepass {

StepMutex::StepMutex() : mutex_(std::make_unique<std::mutex>()), forks_(fork_count()) {}

void StepMutex::lock() {
  if (forks_ != fork_count()) {
    if (owner_ != fork_survivor()) {
      if (mutex_->try_lock()) {
        mutex_->unlock();
      } else {
        // A thread of the parent has locked it, and may not have had the GIL yet to become the owner. A locked mutex
        // must not be destroyed.
        [[maybe_unused]] const auto* abandoned = std::exchange(mutex_, std::make_unique<std::mutex>()).release();
      }
      owner_ = {};
    }
    forks_ = fork_count();
  }
  if (owner_ == std::this_thread::get_id()) throw std::runtime_error("step() was called from within step()");
  if (!mutex_->try_lock()) {
    std::mutex& mutex = *mutex_;
    const py::gil_scoped_release release;
    mutex.lock();
  }
  owner_ = std::this_thread::get_id();
}

void StepMutex::unlock() {
  owner_ = {};
  mutex_->unlock();
}

}  // namespace onepass
