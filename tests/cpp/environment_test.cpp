// The effect of ONEPASS_ISA and ONEPASS_TUNING on the first call. CMakeLists.txt runs this with several values.
// ONEPASS_EXPECT and ONEPASS_EXPECT_TUNING have the expected results: a name, `best`, or `error`.
#include <doctest/doctest.h>

#include <cstdlib>
#include <stdexcept>
#include <string>

#include "cases.h"
#include "cpu/dispatch.h"
#include "cpu/step.h"
#include "cpu/tuning.h"

namespace onepass::testing {
namespace {

TEST_CASE("ONEPASS_ISA") {
  const char* expect = std::getenv("ONEPASS_EXPECT");
  REQUIRE(expect != nullptr);
  if (std::string(expect) == "error") {
    // Every call fails until one is forced. A step never uses another one silently.
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

TEST_CASE("ONEPASS_TUNING") {
  const char* expect = std::getenv("ONEPASS_EXPECT_TUNING");
  REQUIRE(expect != nullptr);
  if (std::string(expect) == "error") {
    CHECK_THROWS_WITH_AS(active_tuning(), doctest::Contains("ONEPASS_TUNING=zen4 is unknown"), std::invalid_argument);
    CHECK_THROWS_AS(run_step(RuleId::sgd, {}, 1), std::invalid_argument);
  } else {
    CHECK(&active_tuning() == &choose_tuning(std::string(expect) == "best" ? "" : expect));
  }
}

}  // namespace
}  // namespace onepass::testing
