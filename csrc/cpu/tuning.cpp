#include "cpu/tuning.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>
#include <string>

namespace onepass {
namespace {

#ifdef __x86_64__
bool is_intel() { return __builtin_cpu_is("intel"); }
bool is_amd() { return __builtin_cpu_is("amd"); }
#else
bool is_intel() { return false; }
bool is_amd() { return false; }
#endif

// A hardware prefetcher follows arrays that are read in order, but starts again in each page. Measured on two cores:
// - intel: a Xeon (Emerald Rapids), pages of 4 KiB. 3 KiB ahead took 0.7 to 0.85 of the time; 2, 4 and 6 KiB hardly
//   differ. Of tiles, two ahead gained more than one or four on an older Xeon.
// - amd: an EPYC of the fourth generation (Zen 4). Two tiles of 1 KiB ahead took 1.15 to 1.5 times as long in float32;
//   in 16-bit formats no distance gained beyond noise.
// - generic: not measured. Without prefetch there are fewer instructions.
constexpr Tuning kTunings[] = {
    {.name = "intel", .fits = is_intel, .bytes_ahead = 3072, .tiles_ahead = 2},
    {.name = "amd", .fits = is_amd, .bytes_ahead = 0, .tiles_ahead = 0},
    {.name = "generic", .fits = [] { return true; }, .bytes_ahead = 0, .tiles_ahead = 0},
};

std::atomic<const Tuning*> active{nullptr};

}  // namespace

std::span<const Tuning> tunings() { return kTunings; }

const Tuning& choose_tuning(std::string_view name) {
  std::string known;
  for (const Tuning& tuning : kTunings) {
    if (name.empty() ? tuning.fits() : name == tuning.name) return tuning;
    known += known.empty() ? "" : ", ";
    known += tuning.name;
  }
  throw std::invalid_argument("ONEPASS_TUNING=" + std::string(name) + " is unknown; there are: " + known);
}

const Tuning& active_tuning() {
  const Tuning* tuning = active.load(std::memory_order_acquire);
  if (tuning == nullptr) {
    const char* name = std::getenv("ONEPASS_TUNING");
    tuning = &choose_tuning(name == nullptr ? "" : name);
    active.store(tuning, std::memory_order_release);
  }
  return *tuning;
}

void force_tuning(std::string_view name) { active.store(&choose_tuning(name), std::memory_order_release); }

}  // namespace onepass
