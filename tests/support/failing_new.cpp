// Loaded before everything else (LD_PRELOAD): an operator new that fails when it is told to, in onepass._core only.
#include <dlfcn.h>

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <new>

namespace {

std::atomic<long> remaining{0};  // allocations until one fails; 0: none does

void* allocate(std::size_t size, std::size_t alignment, const void* caller) {
  if (remaining.load() > 0) {
    Dl_info info;
    const bool is_ours = dladdr(caller, &info) != 0 && std::strstr(info.dli_fname, "/_core.") != nullptr;
    if (is_ours && remaining.fetch_sub(1) == 1) throw std::bad_alloc();
  }
  if (size == 0) size = 1;
  void* const made = alignment == 0 ? std::malloc(size)
                                    : std::aligned_alloc(alignment, (size + alignment - 1) / alignment * alignment);
  if (made == nullptr) throw std::bad_alloc();
  return made;
}

}  // namespace

extern "C" {

// The n-th allocation from now on fails, once.
void onepass_fail(long n) { remaining = n; }

// Lets all succeed. Returns how many more would have been made until one fails; 0: one has failed, or none was to.
long onepass_succeed() { return remaining.exchange(0); }
}

void* operator new(std::size_t size) { return allocate(size, 0, __builtin_return_address(0)); }
void* operator new[](std::size_t size) { return allocate(size, 0, __builtin_return_address(0)); }
void* operator new(std::size_t size, std::align_val_t alignment) {
  return allocate(size, static_cast<std::size_t>(alignment), __builtin_return_address(0));
}
void* operator new[](std::size_t size, std::align_val_t alignment) {
  return allocate(size, static_cast<std::size_t>(alignment), __builtin_return_address(0));
}
void operator delete(void* made) noexcept { std::free(made); }
void operator delete[](void* made) noexcept { std::free(made); }
void operator delete(void* made, std::size_t) noexcept { std::free(made); }
void operator delete[](void* made, std::size_t) noexcept { std::free(made); }
void operator delete(void* made, std::align_val_t) noexcept { std::free(made); }
void operator delete[](void* made, std::align_val_t) noexcept { std::free(made); }
void operator delete(void* made, std::size_t, std::align_val_t) noexcept { std::free(made); }
void operator delete[](void* made, std::size_t, std::align_val_t) noexcept { std::free(made); }
