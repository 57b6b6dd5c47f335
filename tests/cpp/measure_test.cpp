// The measure phase: every element and every sum by its definition, for formats, layouts, rows, instruction sets and
// threads.
#include "cpu/measure.h"

#include <doctest/doctest.h>

#include <cmath>
#include <limits>
#include <vector>

#include "cases.h"
#include "cpu/dispatch.h"
#include "cpu/rows.h"
#include "gradients.h"
#include "reference.h"

namespace onepass::testing {
namespace {

using enum Format;

template <class Check>
void for_each_isa_and_team(Check&& check) {
  for (const Isa& isa : compiled_isas()) {
    if (!isa.supported()) continue;
    force_isa(isa.name);
    for (const int threads : {1, 2, 3}) check(threads);
  }
  force_isa("");
}

TEST_CASE("packed gradients of every format and length") {
  for (const bool wide : {false, true})
    for (const Format format : {float32, float64, bfloat16, float16})
      for (const std::int64_t length : {0, 1, 31, 33, 1023, 1025, 16'384, 16'385, 200'000})
        for (const std::size_t misalignment : {0, 2}) {
          Problem problem = make_problem(setting_of("lion, decay"), {length},
                                         {.formats = all_of(format), .wide = wide, .misalignment = misalignment});
          const std::vector<double> values = elements(problem);
          const Job job = gradient_of(problem);
          CAPTURE(length);
          for_each_isa_and_team([&](int threads) {
            CHECK(measure_gradients(Measure::sum_of_squares, {&job, 1}, threads)[0] == expected_squares(values));
            CHECK(measure_gradients(Measure::largest_magnitude, {&job, 1}, threads)[0] == expected_largest(values));
          });
        }
}

TEST_CASE("gradients with a layout") {
  Problem problem = make_problem(setting_of("lion, decay"), {40, 50}, {.strides = {{{}, {120, 2}, {}}}});
  Job job = gradient_of(problem);
  std::array<std::span<const std::int64_t>, kMaxOperands> strides;
  strides[kParam] = strides[kGrad] = problem.tensors[kGrad].strides;
  const Layout layout = make_layout(problem.shape, strides);
  job.layout = &layout;
  const std::vector<double> values = elements(problem);
  for_each_isa_and_team([&](int threads) {
    CHECK(measure_gradients(Measure::sum_of_squares, {&job, 1}, threads)[0] == expected_squares(values));
    CHECK(measure_gradients(Measure::largest_magnitude, {&job, 1}, threads)[0] == expected_largest(values));
  });
}

TEST_CASE("rows of sparse gradients are added up before they are measured") {
  // Entries 0 and 2 belong to row 5.
  constexpr std::int64_t kRows[] = {5, 1, 5};
  float values[] = {1.0F, 2.0F, 3.0F, 4.0F, -3.0F, 5.0F};
  const std::int64_t sizes[] = {7};
  Rows rows = read_rows({.data = kRows, .entries = 3, .strides = {3, 1}}, sizes, 2);
  coalesce(rows);
  Job job;
  job.operands[kGrad] = {reinterpret_cast<std::byte*>(values), float32};
  job.rows = &rows;
  job.length = rows.count() * rows.length;
  for_each_isa_and_team([&](int threads) {
    CHECK(measure_gradients(Measure::sum_of_squares, {&job, 1}, threads)[0] == 9.0 + 16.0 + 4.0 + 49.0);
    CHECK(measure_gradients(Measure::largest_magnitude, {&job, 1}, threads)[0] == 7.0);
  });
}

TEST_CASE("NaN, infinity, and squares that float32 cannot hold") {
  for (const std::int64_t at : {std::int64_t{0}, std::int64_t{40'000}, std::int64_t{69'999}}) {
    Problem problem = make_problem(setting_of("lion, decay"), {70'000}, {});
    const Job job = gradient_of(problem);
    const auto measured = [&](float value, Measure what) {
      store(problem.tensors[kGrad], at, value);
      return measure_gradients(what, {&job, 1}, 2)[0];
    };
    using Float = std::numeric_limits<float>;
    CHECK(std::isnan(measured(Float::quiet_NaN(), Measure::sum_of_squares)));
    CHECK(std::isnan(measured(-Float::quiet_NaN(), Measure::largest_magnitude)));
    CHECK(std::isinf(measured(-Float::infinity(), Measure::sum_of_squares)));
    CHECK(measured(-Float::infinity(), Measure::largest_magnitude) == Float::infinity());
    CHECK(std::isfinite(measured(Float::max(), Measure::sum_of_squares)));
    CHECK(measured(Float::max(), Measure::largest_magnitude) == Float::max());
  }
}

TEST_CASE("many jobs, in order") {
  std::vector<Problem> problems;
  for (std::int64_t k = 0; k < 300; ++k)
    problems.push_back(make_problem(setting_of("lion, decay"), {k * 7 % 113 * (k % 10 == 0 ? 1000 : 1)}, {}));
  std::vector<Job> jobs;
  for (Problem& problem : problems) jobs.push_back(gradient_of(problem));
  for_each_isa_and_team([&](int threads) {
    const std::vector<double> measured = measure_gradients(Measure::sum_of_squares, jobs, threads);
    REQUIRE(measured.size() == jobs.size());
    double total = 0.0;
    for (std::size_t k = 0; k < jobs.size(); ++k) {
      CHECK(measured[k] == expected_squares(elements(problems[k])));
      total += measured[k];
    }
    CHECK(combine(Measure::sum_of_squares, measured) == total);
  });
  const double some[] = {1.0, std::numeric_limits<double>::quiet_NaN(), 3.0};
  CHECK(std::isnan(combine(Measure::largest_magnitude, some)));
  CHECK(combine(Measure::largest_magnitude, std::span(some).first(1)) == 1.0);
  CHECK(combine(Measure::sum_of_squares, {}) == 0.0);
}

}  // namespace
}  // namespace onepass::testing
