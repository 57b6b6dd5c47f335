// What the first call finds in ONEPASS_ISA. CMakeLists.txt runs this with several values, and ONEPASS_EXPECT tells what
// should come of it: a name, `best`, or `error`.
#include <doctest/doctest.h>

#include <cstdlib>
#include <stdexcept>
#include <string>

#include "cases.h"
#include "cpu/dispatch.h"
#include "cpu/step.h"

namespace onepass::testing {
namespace {

TEST_CASE("ONEPASS_ISA") {
  const char* expect = std::getenv("ONEPASS_EXPECT");
  REQUIRE(expect != nullptr);
  if (std::string(expect) == "error") {
    // Every call fails until something is forced: a step never falls back in silence.
    CHECK_THROWS_WITH_AS(active_isa(), doctest::Contains("ONEPASS_ISA=mmx is not available"), std::invalid_argument);
    CHECK_THROWS_AS(run_step(RuleId::sgd, {}, 1), std::invalid_argument);
    force_isa("");
    CHECK(std::string(active_isa().name) == supported_isas().front().name);
  } else {
    const std::string name = std::string(expect) == "best" ? supported_isas().front().name : expect;
    CHECK(active_isa().name == name);
    CHECK(&active_isa() == &choose_isa(name));
  }
}

}  // namespace
}  // namespace onepass::testing
