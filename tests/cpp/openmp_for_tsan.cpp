// For the thread sanitizer, which does not see how libgomp, which is not built with it, begins and ends a parallel
// region. This function is called instead of libgomp's and calls it. It tells the sanitizer that everything before a
// region happens before the region, and that the region happens before everything after it. Races within a region are
// still found; nothing is suppressed.
#include <dlfcn.h>
#include <sanitizer/tsan_interface.h>

namespace {

using Body = void (*)(void*);

struct Region {
  Body body;
  void* data;
};

void run(void* region) {
  __tsan_acquire(region);
  static_cast<Region*>(region)->body(static_cast<Region*>(region)->data);
  __tsan_release(region);
}

}  // namespace

extern "C" void GOMP_parallel(Body body, void* data, unsigned threads, unsigned flags);
extern "C" void GOMP_parallel(Body body, void* data, unsigned threads, unsigned flags) {
  using Parallel = decltype(&GOMP_parallel);
  static const auto next = reinterpret_cast<Parallel>(dlsym(RTLD_NEXT, "GOMP_parallel"));
  Region region{body, data};
  __tsan_release(&region);
  next(run, &region, threads, flags);
  __tsan_acquire(&region);
}
