// The lists of instruction sets and tunings, and how one is chosen and forced. environment_test.cpp tests the
// environment variables.
#include "cpu/dispatch.h"

#include <doctest/doctest.h>

#include <algorithm>
#include <set>
#include <stdexcept>
#include <string>
#include <vector>

#include "cases.h"
#include "cpu/tuning.h"

namespace onepass::testing {
namespace {

TEST_CASE("instruction sets: the best first, the baseline last") {
  std::vector<std::string> names;
  for (const Isa& isa : compiled_isas()) names.emplace_back(isa.name);
  const std::vector<std::string> expected = {
#ifdef ONEPASS_HAS_AVX512_BF16
      "avx512_bf16",
#endif
#ifdef ONEPASS_HAS_AVX512
      "avx512",
#endif
#ifdef ONEPASS_HAS_AVX2
      "avx2",
#endif
#ifdef __aarch64__
      "neon",
#else
      "baseline",
#endif
  };
  CHECK(names == expected);
  CHECK(compiled_isas().back().supported());
}

TEST_CASE("each instruction set has its own kernels, but avx512_bf16 those of avx512 for float64") {
  std::set<Kernel> kernels;
  std::size_t types = 0;
  for (const Isa& isa : compiled_isas()) {
    const bool has_wide = std::string(isa.name) != "avx512_bf16";  // which has those of avx512
    types += has_wide ? 2 : 1;
    kernels.insert(std::begin(isa.kernels.narrow.rules), std::end(isa.kernels.narrow.rules));
    if (has_wide) kernels.insert(std::begin(isa.kernels.wide.rules), std::end(isa.kernels.wide.rules));
    if (!has_wide) CHECK(&isa.kernels.wide == &(&isa + 1)->kernels.wide);  // the next best
  }
  CHECK(kernels.size() == types * kRules);
  CHECK(kernels.count(nullptr) == 0);
}

TEST_CASE("an instruction set is chosen by name, or the best one is") {
  CHECK(std::string(choose_isa("").name) == supported_isas().front().name);
  for (const Isa& isa : supported_isas()) CHECK(std::string(choose_isa(isa.name).name) == isa.name);
}

TEST_CASE("an unknown name throws, and lists what this machine has") {
  std::string list;
  for (const Isa& isa : supported_isas()) list += (list.empty() ? "" : ", ") + std::string(isa.name);
  for (const char* name : {"mmx", "AVX2", "avx", "avx512 ", "best"}) {
    const std::string want = std::string("ONEPASS_ISA=") + name + " is not available; this machine has: " + list;
    CHECK_THROWS_WITH_AS(choose_isa(name), want.c_str(), std::invalid_argument);
  }
}

TEST_CASE("a compiled set that this machine does not support throws, too") {
  for (const Isa& isa : compiled_isas())
    if (!isa.supported()) CHECK_THROWS_AS(choose_isa(isa.name), std::invalid_argument);
}

TEST_CASE("a forced instruction set is used from then on") {
  for (const Isa& isa : supported_isas()) {
    force_isa(isa.name);
    CHECK(std::string(active_isa().name) == isa.name);
    CHECK(&active_isa().kernels.narrow == &isa.kernels.narrow);
    CHECK(&active_isa().kernels.wide == &isa.kernels.wide);
  }
  const std::string before = active_isa().name;
  CHECK_THROWS_AS(force_isa("mmx"), std::invalid_argument);
  CHECK(active_isa().name == before);
  force_isa("");
  CHECK(std::string(active_isa().name) == supported_isas().front().name);
}

TEST_CASE("tunings: by name, or the first that fits this processor") {
  std::string list;
  for (const Tuning& tuning : tunings()) {
    CHECK(&choose_tuning(tuning.name) == &tuning);
    list += (list.empty() ? "" : ", ") + std::string(tuning.name);
  }
  CHECK(list == "intel, amd, generic");
  CHECK(choose_tuning("").fits());
  CHECK(tunings().back().fits());
  for (const char* name : {"Intel", "zen4", "intel "}) {
    const std::string want = std::string("ONEPASS_TUNING=") + name + " is unknown; there are: " + list;
    CHECK_THROWS_WITH_AS(choose_tuning(name), want.c_str(), std::invalid_argument);
  }
}

TEST_CASE("a forced tuning is used from then on") {
  for (const Tuning& tuning : tunings()) {
    force_tuning(tuning.name);
    CHECK(&active_tuning() == &tuning);
  }
  CHECK_THROWS_AS(force_tuning("zen4"), std::invalid_argument);
  CHECK(&active_tuning() == &tunings().back());
  force_tuning("");
  CHECK(&active_tuning() == &choose_tuning(""));
}

}  // namespace
}  // namespace onepass::testing
