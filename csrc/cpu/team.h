// The OpenMP threads of a step.
#pragma once

#include <omp.h>

#include <cstdint>

#include "cpu/fpmode.h"

namespace onepass {

// Returns how many of at most `threads` threads to use for work that moves this many bytes. One in a forked child.
int team_size(std::int64_t bytes, int threads);

// Sets how many bytes are worth another thread; 0: the default. So tests can divide small tensors between threads.
void force_bytes_per_thread(std::int64_t bytes);

// Calls work(index, count) on each of `count` threads, all in the floating-point mode of a step.
template <class Work>
void on_team(int count, Work&& work) {
  if (count < 2) {
    const StepMode mode;
    work(0, 1);
    return;
  }
#pragma omp parallel num_threads(count)
  {
    const StepMode mode;
    work(omp_get_thread_num(), omp_get_num_threads());
  }
}

}  // namespace onepass
