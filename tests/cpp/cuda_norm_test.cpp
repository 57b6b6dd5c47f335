// The CUDA kernels that measure gradients and decide how the step depends on their norm, imitated on the CPU.
#include <doctest/doctest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <limits>
#include <optional>
#include <vector>

#include "cpu/fpmode.h"
#include "cuda/step.h"
#include "gradients.h"
#include "layout.h"
#include "reference.h"

extern "C" const onepass::cuda::Backend* onepass_emulated_backend();

namespace onepass::testing {
namespace {

using cuda::Backend;
using cuda::DeviceClipping;
using cuda::DeviceJob;
using enum Format;

using Double = std::numeric_limits<double>;
using Float = std::numeric_limits<float>;

constexpr std::array kMeasures{Measure::sum_of_squares, Measure::largest_magnitude};
constexpr double kUnwritten = -77.0;

// What depends on the norm beside the gradients.
struct Request {
  NormLimits limits{};
  double grad_factor = 1.0;
  std::optional<float> grad_scale;
  std::optional<float> found_inf;
};

const std::byte* bytes_of(const std::optional<float>& number) {
  return number ? reinterpret_cast<const std::byte*>(&*number) : nullptr;
}

// Measures in the shortest chunks.
DeviceClipping decide(Measure what, const std::vector<Job>& gradients, const Request& request = {}) {
  Backend backend = *onepass_emulated_backend();
  backend.multiprocessors = [](int) { return 1 << 30; };
  std::vector<double> measures(cuda::measures_size(backend, gradients, 0) / sizeof(double) + 1, kUnwritten);
  DeviceClipping clipping{};
  cuda::run_measures(backend, what, gradients, request.limits, request.grad_factor,
                     {.grad_scale = bytes_of(request.grad_scale),
                      .found_inf = bytes_of(request.found_inf),
                      .clipping = reinterpret_cast<const std::byte*>(&clipping)},
                     reinterpret_cast<std::byte*>(measures.data()), 0, nullptr);
  CHECK(std::ranges::count(measures, kUnwritten) == 1);
  return clipping;
}

// The norm of the elements of all gradients.
double norm_by_definition(Measure what, const std::vector<double>& values) {
  return what == Measure::sum_of_squares ? std::sqrt(expected_squares(values)) : expected_largest(values);
}

void check_norm(Measure what, const std::vector<Job>& gradients, const std::vector<double>& values) {
  const double want = norm_by_definition(what, values);
  const double got = decide(what, gradients).norm;
  // Each element, thread, lane and block adds one rounding at most, with random signs.
  const double tolerance = what == Measure::sum_of_squares ? 16 * Double::epsilon() * want : 0.0;
  CHECK(std::fabs(got - want) <= tolerance);
}

TEST_CASE("gradients of every format, length and alignment") {
  for (const Measure what : kMeasures)
    for (const bool wide : {false, true})
      for (const Format format : {float32, float64, bfloat16, float16})
        for (const std::size_t ahead : {0U, 1U, 2U, 3U})
          for (const std::int64_t length : {0, 1, 2, 3, 5, 1023, 1025, 4095, 4096, 4097, 4100, 40'000}) {
            Spec spec{.formats = all_of(format), .wide = wide};
            spec.ahead.fill(ahead);
            Problem problem = make_problem(setting_of("lion, decay"), {length}, spec);
            CAPTURE(length);
            check_norm(what, {gradient_of(problem)}, elements(problem));
          }
}

TEST_CASE("a gradient with a layout") {
  Problem problem = make_problem(setting_of("lion, decay"), {40, 150}, {.strides = {{{}, {320, 2}, {}}}});
  Job job = gradient_of(problem);
  std::array<std::span<const std::int64_t>, kMaxOperands> strides;
  strides[kParam] = strides[kGrad] = problem.tensors[kGrad].strides;
  const Layout layout = make_layout(problem.shape, strides);
  job.layout = &layout;
  for (const Measure what : kMeasures) check_norm(what, {job}, elements(problem));
}

TEST_CASE("many gradients of all formats, more than a table has room for") {
  std::vector<Problem> problems;
  for (std::int64_t i = 0; i < 3000; ++i) {
    const bool wide = i % 7 == 0;
    problems.push_back(make_problem(setting_of("lion, decay"), {i * 37 % 113 * (i % 50 == 0 ? 100 : 1)},
                                    {.formats = all_of(i % 3 == 0 ? bfloat16 : native(wide)), .wide = wide}));
  }
  std::vector<Job> jobs;
  std::vector<double> values;
  for (Problem& problem : problems) {
    jobs.push_back(gradient_of(problem));
    const std::vector<double> own = elements(problem);
    values.insert(values.end(), own.begin(), own.end());
  }
  for (const Measure what : kMeasures) check_norm(what, jobs, values);
}

TEST_CASE("no gradient at all") {
  CHECK(decide(Measure::sum_of_squares, {}).norm == 0.0);
  CHECK(decide(Measure::largest_magnitude, {}, {.limits = {.max_norm = 1.0}}).coefficient == 1.0);
}

TEST_CASE("NaN, infinity, and squares that float32 cannot hold") {
  for (const std::int64_t at : {0, 1, 4000, 4096, 9'999}) {
    Problem problem = make_problem(setting_of("lion, decay"), {10'000}, {});
    const Job job = gradient_of(problem);
    const auto norm = [&](float value, Measure what) {
      store(problem.tensors[kGrad], at, value);
      return decide(what, {job}).norm;
    };
    CHECK(std::isnan(norm(Float::quiet_NaN(), Measure::sum_of_squares)));
    CHECK(std::isnan(norm(-Float::quiet_NaN(), Measure::largest_magnitude)));
    CHECK(norm(-Float::infinity(), Measure::sum_of_squares) == Double::infinity());
    CHECK(norm(-Float::infinity(), Measure::largest_magnitude) == Double::infinity());
    CHECK(norm(Float::max(), Measure::sum_of_squares) == doctest::Approx(double{Float::max()}));
    CHECK(norm(Float::max(), Measure::largest_magnitude) == double{Float::max()});
  }
}

// A gradient of one element.
struct Single {
  explicit Single(float value) : problem(make_problem(setting_of("lion, decay"), {1}, {})) {
    store(problem.tensors[kGrad], 0, value);
  }
  DeviceClipping decide(const Request& request) {
    return testing::decide(Measure::sum_of_squares, {gradient_of(problem)}, request);
  }
  Problem problem;
};

TEST_CASE("the coefficient is torch's") {
  Single gradient(-8.0F);
  CHECK(gradient.decide({}).coefficient == 1.0);
  CHECK(gradient.decide({.limits = {.max_norm = 2.0}}).coefficient == 2.0 / (8.0 + 1e-6));
  CHECK(gradient.decide({.limits = {.max_norm = 9.0}}).coefficient == 1.0);
  CHECK(gradient.decide({.limits = {.max_norm = 0.0}}).coefficient == 0.0);
}

TEST_CASE("the norm is that of the gradients after their factor") {
  Single gradient(-8.0F);
  CHECK(gradient.decide({.grad_factor = -0.5}).norm == 4.0);
  const DeviceClipping scaled = gradient.decide({.limits = {.max_norm = 1.0}, .grad_scale = 4.0F});
  CHECK(scaled.norm == 2.0);
  CHECK(scaled.coefficient == 1.0 / (2.0 + 1e-6));
  CHECK(scaled.skips == 0.0);
}

TEST_CASE("what skips a step") {
  Single finite(3.0F);
  Single infinite(Float::infinity());
  Single nan(Float::quiet_NaN());
  const NormLimits skips{.max_norm = 1.0, .skips_nonfinite = true};
  CHECK(finite.decide({.limits = skips}).skips == 0.0);
  CHECK(infinite.decide({.limits = skips}).skips == 1.0);
  CHECK(nan.decide({.limits = skips}).skips == 1.0);
  CHECK(infinite.decide({.limits = {.max_norm = 1.0}}).skips == 0.0);
  CHECK(infinite.decide({.limits = {.max_norm = 1.0}}).coefficient == 0.0);
  CHECK(std::isnan(nan.decide({.limits = {.max_norm = 1.0}}).coefficient));
  CHECK(finite.decide({.limits = skips, .found_inf = 0.0F}).skips == 0.0);
  CHECK(finite.decide({.limits = skips, .found_inf = 1.0F}).skips == 2.0);
  CHECK(infinite.decide({.limits = skips, .found_inf = 1.0F}).skips == 2.0);
}

// -- the step --------------------------------------------------------------------------------------------------------

void step(std::vector<Problem>& problems, const DeviceClipping& clipping) {
  std::deque<BoundJob> bound;
  std::vector<DeviceJob> jobs;
  for (Problem& problem : problems) jobs.push_back({.job = bound.emplace_back(problem).without_sums()});
  cuda::run_step(*onepass_emulated_backend(), problems.front().setting.rule, jobs,
                 {.clipping = reinterpret_cast<const std::byte*>(&clipping)}, nullptr, 0, nullptr);
}

TEST_CASE("a step multiplies gradients by the coefficient that was decided") {
  for (const Setting& setting : kSettings) {
    std::vector<Problem> problems;
    for (const bool wide : {false, true})
      for (const Format format : {native(wide), bfloat16})
        for (const double sign : {1.0, -1.0})
          problems.push_back(
              make_problem(setting, {1030}, {.formats = all_of(format), .wide = wide, .grad_factor = sign * 0.3}));
    std::vector<Problem> got = problems;
    step(got, {.norm = 7.0, .coefficient = 0.7, .skips = 0.0});
    for (std::size_t i = 0; i < problems.size(); ++i) {
      problems[i].grad_factor *= 0.7;
      CHECK(difference(got[i], expected(problems[i])) == "");
    }
  }
}

TEST_CASE("a step that is skipped changes nothing but gradients that it zeroes") {
  for (const Setting& setting : kSettings)
    for (const double skips : {1.0, 2.0})
      for (const bool zeroes : {false, true}) {
        std::vector<Problem> problems;
        for (const bool wide : {false, true})
          for (const Format format : {native(wide), float64, bfloat16})
            for (const std::size_t ahead : {0U, 1U}) {
              Spec spec{.formats = all_of(format), .wide = wide, .zeroes_grad = zeroes, .followers = kFollowers[2]};
              spec.ahead.fill(ahead);
              problems.push_back(make_problem(setting, {5000}, spec));
              spec.strides = {{{}, {90, 3}, {}}};
              problems.push_back(make_problem(setting, {7, 30}, spec));
            }
        std::vector<Problem> got = problems;
        step(got, {.norm = Double::infinity(), .coefficient = 1.0, .skips = skips});
        for (std::size_t i = 0; i < problems.size(); ++i) {
          if (zeroes)
            for_each_index(problems[i].shape, [&](const auto& index) {
              Tensor& grad = problems[i].tensors[kGrad];
              store(grad, offset_of(index, grad.strides), 0.0);
            });
          CHECK(difference(got[i], problems[i]) == "");
        }
      }
}

}  // namespace
}  // namespace onepass::testing
