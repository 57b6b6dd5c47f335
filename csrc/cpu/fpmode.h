// The floating-point mode of a step: round to nearest, and denormal operands and results are flushed to zero. Denormals
// make a step up to 16 times slower, and are too small to change a parameter.
#pragma once

#include <cstdint>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace onepass {

// Sets the mode of this thread. The destructor restores the caller's mode. On other processors it does nothing, and
// variables would be unused.
class [[maybe_unused]] StepMode {
 public:
#if defined(__SSE2__)
  StepMode() : saved_(_mm_getcsr()) { _mm_setcsr(0x9fc0U); }  // FTZ, DAZ, nearest, no exception traps
  ~StepMode() { _mm_setcsr(saved_); }

 private:
  std::uint32_t saved_;
#elif defined(__aarch64__)
  StepMode() {
    asm volatile("mrs %0, fpcr" : "=r"(saved_));
    asm volatile("msr fpcr, %0" : : "r"(std::uint64_t{1} << 24));  // FZ, nearest, no exception traps
  }
  ~StepMode() { asm volatile("msr fpcr, %0" : : "r"(saved_)); }

 private:
  std::uint64_t saved_ = 0;
#else
  StepMode() = default;
#endif
 public:
  StepMode(const StepMode&) = delete;
  StepMode& operator=(const StepMode&) = delete;
};

}  // namespace onepass
