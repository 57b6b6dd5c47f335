#include "cpu/dispatch.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>
#include <string>

namespace onepass {

namespace baseline {
extern const KernelsOfType narrow_kernels, wide_kernels;
}
#ifdef ONEPASS_HAS_AVX2
namespace avx2 {
extern const KernelsOfType narrow_kernels, wide_kernels;
}
#endif
#ifdef ONEPASS_HAS_AVX512
namespace avx512 {
extern const KernelsOfType narrow_kernels, wide_kernels;
}
#endif
#ifdef ONEPASS_HAS_AVX512_BF16
namespace avx512_bf16 {
extern const KernelsOfType narrow_kernels;
}
#endif

namespace {

#ifdef __x86_64__
// The compiler's detection includes the support of the operating system (XGETBV).
[[maybe_unused]] bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}
[[maybe_unused]] bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
[[maybe_unused]] bool has_avx512_bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }
#endif

// In order of preference.
constexpr Isa kIsas[] = {
#ifdef ONEPASS_HAS_AVX512_BF16
    {"avx512_bf16", has_avx512_bf16, {avx512_bf16::narrow_kernels, avx512::wide_kernels}},
#endif
#ifdef ONEPASS_HAS_AVX512
    {"avx512", has_avx512, {avx512::narrow_kernels, avx512::wide_kernels}},
#endif
#ifdef ONEPASS_HAS_AVX2
    {"avx2", has_avx2, {avx2::narrow_kernels, avx2::wide_kernels}},
#endif
    {ONEPASS_BASELINE_NAME, [] { return true; }, {baseline::narrow_kernels, baseline::wide_kernels}},
};

std::atomic<const Isa*> active{nullptr};

}  // namespace

std::span<const Isa> compiled_isas() { return kIsas; }

const Isa& choose_isa(std::string_view name) {
  std::string known;
  for (const Isa& isa : kIsas) {
    if (!isa.supported()) continue;
    if (name.empty() || name == isa.name) return isa;
    known += known.empty() ? "" : ", ";
    known += isa.name;
  }
  throw std::invalid_argument("ONEPASS_ISA=" + std::string(name) + " is not available; this machine has: " + known);
}

const Isa& active_isa() {
  const Isa* isa = active.load(std::memory_order_acquire);
  if (isa == nullptr) {
    const char* name = std::getenv("ONEPASS_ISA");
    isa = &choose_isa(name == nullptr ? "" : name);
    active.store(isa, std::memory_order_release);
  }
  return *isa;
}

void force_isa(std::string_view name) { active.store(&choose_isa(name), std::memory_order_release); }

}  // namespace onepass
