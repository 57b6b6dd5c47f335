// A kernel's object file with one fault, which no_leak.cmake must find.
#include "target.h"

#if defined(LEAK_INLINE_FUNCTION)
namespace onepass {
// Weak, and with the same name in the object file of every instruction set.
[[gnu::noinline]] inline void leaked(float* x, int n) {
  for (int i = 0; i < n; ++i) x[i] *= 2.0F;
}
}  // namespace onepass
#elif defined(LEAK_STATIC_INITIALIZER)
namespace onepass {
float outside();
namespace {
// Runs when the library is loaded, whatever the processor.
[[maybe_unused]] const float initialized = outside() * 2.0F;
}  // namespace
}  // namespace onepass
#endif

namespace onepass::inline ONEPASS_TARGET {

extern const int narrow_kernels;
const int narrow_kernels = 0;
// NOLINTNEXTLINE(misc-use-internal-linkage): a symbol of the object file, as a kernel is
void run(float* x, int n);
void run([[maybe_unused]] float* x, [[maybe_unused]] int n) {
#if defined(LEAK_INLINE_FUNCTION)
  leaked(x, n);
#endif
}

}  // namespace onepass::inline ONEPASS_TARGET
