// Rules whose update depends on sums over the whole tensor: run_step against sums in long double.
#include <doctest/doctest.h>

#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <string>
#include <utility>
#include <vector>

#include "cases.h"
#include "cpu/dispatch.h"
#include "cpu/fpmode.h"
#include "cpu/step.h"
#include "reference.h"

namespace onepass::testing {
namespace {

using enum Format;

// The step with constants that the sums have completed.
template <class Rule, class T>
void step_with_sums(Problem& problem) {
  auto constants = Constants(problem.setting, problem.wide).as<typename Rule::template Constants<T>>();
  std::array<long double, kMaxSums> exact{};
  for_each_index(problem.shape, [&](const auto& index) {
    T values[kMaxOperands] = {};
    for (std::size_t k = 0; k < problem.tensors.size(); ++k)
      if (uses(problem, k)) values[k] = load<T>(problem.tensors[k], offset_of(index, problem.tensors[k].strides));
    if (problem.master != Master::none) values[kParam] = master_at(problem, index, static_cast<float>(values[kParam]));
    T gradient = static_cast<T>(problem.grad_factor) * values[kGrad];
    if (const T limit = static_cast<T>(problem.clip_value); std::fabs(gradient) > limit)
      gradient = std::copysign(limit, gradient);
    [&]<std::size_t... I>(std::index_sequence<I...>) {
      [&]<std::size_t... K>(std::index_sequence<K...>) {
        ((exact[K] += Rule::template summed<K>(constants, values[kParam], gradient, values[kFirstState + I]...)), ...);
      }(std::make_index_sequence<Rule::sums>());
    }(std::make_index_sequence<Rule::state_names.size()>());
  });
  std::array<double, kMaxSums> sums{};
  for (std::size_t k = 0; k < sums.size(); ++k) sums[k] = static_cast<double>(exact[k]);
  const RuleInfo& info = info_of(Rule::id);
  if (info.takes_sums(problem.setting.hyper.data()))
    info.use_sums(problem.wide, sums.data(), static_cast<double>(length_of(problem)), &constants,
                  problem.setting.scalars.data());
  reference_step<Rule, T>(problem, constants);
}

Problem expected_with_sums(Problem problem) {
  with_rule(problem.setting.rule, [&]<class Rule>() {
    if constexpr (requires { Rule::sums; }) {
      const StepMode mode;
      if (problem.wide) {
        step_with_sums<Rule, double>(problem);
      } else {
        step_with_sums<Rule, float>(problem);
      }
    }
  });
  return problem;
}

std::vector<Setting> settings() {
  std::vector<Setting> found;
  for (const Setting& setting : kSettings)
    if (info_of(setting.rule).takes_sums(setting.hyper.data())) found.push_back(setting);
  return found;
}

// Steps a problem with every instruction set and several numbers of threads, and checks every bit. In float64, where
// the sums are as exact as the arithmetic, all have the same bits, and elements are near.
void check(const Problem& problem) {
  Problem want = expected_with_sums(problem);
  std::vector<Problem> all;
  for (const Isa& isa : supported_isas()) {
    force_isa(isa.name);
    for (const int threads : {1, 2, 3}) {
      Problem got = problem;
      {
        const BoundJob bound(got);
        const Job job = bound.job();
        run_step(problem.setting.rule, {&job, 1}, threads);
      }
      all.push_back(std::move(got));
    }
  }
  force_isa("");
  for (const Problem& got : all) {
    CHECK(difference(got, all.front()) == "");
    for (std::size_t n = 0; n < kMaxScalars; ++n) {
      const double scalar = got.setting.scalars[n], wanted = want.setting.scalars[n];
      const double first = all.front().setting.scalars[n];
      CHECK((scalar == first || (std::isnan(scalar) && std::isnan(first))));
      CHECK(
          (std::isnan(wanted) ? std::isnan(scalar) : std::fabs(scalar - wanted) <= 1e-14 * (1.0 + std::fabs(wanted))));
    }
  }
  if (!problem.wide) {
    CHECK(difference(all.front(), want) == "");
    return;
  }
  for (std::size_t k = 0; k < want.tensors.size(); ++k)
    if (uses(want, k))
      for_each_index(want.shape, [&](const auto& index) {
        const std::int64_t offset = offset_of(index, want.tensors[k].strides);
        const auto a = load<double>(all.front().tensors[k], offset), b = load<double>(want.tensors[k], offset);
        CHECK((std::isnan(b) ? std::isnan(a) : std::fabs(a - b) <= 1e-14 * (1.0 + std::fabs(b))));
      });
}

TEST_CASE("every format and length") {
  for (const Setting& setting : settings()) {
    CAPTURE(setting.what);
    for (const std::int64_t length : {0, 1, 31, 257, 1025, 16'385, 70'001})
      for (const Format format : {float32, bfloat16, float16}) {
        Spec spec;
        spec.formats.fill(format);
        check(make_problem(setting, {length}, spec));
      }
    Spec spec;
    spec.formats.fill(float64);
    spec.wide = true;
    check(make_problem(setting, {5'003}, spec));
    check(make_problem(setting, {5'003}, {.formats = {bfloat16, float16, float32, float32}}));
  }
}

TEST_CASE("layouts, scaled and clamped gradients, masters and followers") {
  for (const Setting& setting : settings()) {
    CAPTURE(setting.what);
    check(make_problem(setting, {40, 50}, {.strides = {{{}, {120, 2}, {}}}}));
    check(make_problem(setting, {3, 401}, {.grad_factor = -0.25, .strides = {{{}, {1, 3}, {}}}}));
    check(make_problem(setting, {2'000}, {.grad_factor = 0.5, .misalignment = 4, .clip_value = 0.125}));
    check(make_problem(setting, {2'000},
                       {.formats = {bfloat16, bfloat16, float32, float32}, .master = Master::low_bits}));
    check(make_problem(setting, {2'000}, {.formats = {float16, float16, float32, float32}, .master = Master::whole}));
    check(make_problem(setting, {2'000}, {.zeroes_grad = true, .followers = {Follower{0.3, true}}}));
  }
}

TEST_CASE("each tensor has its own sums") {
  for (const Setting& setting : settings()) {
    CAPTURE(setting.what);
    std::vector<Problem> got;
    for (const std::int64_t length : {5, 0, 20'000, 1, 333, 40'000}) got.push_back(make_problem(setting, {length}));
    std::vector<Problem> want;
    for (const Problem& problem : got) want.push_back(expected_with_sums(problem));
    {
      std::deque<BoundJob> bound;
      std::vector<Job> jobs;
      for (Problem& problem : got) jobs.push_back(bound.emplace_back(problem).job());
      run_step(setting.rule, jobs, 3);
    }
    for (std::size_t i = 0; i < got.size(); ++i) CHECK(difference(got[i], want[i]) == "");
  }
}

}  // namespace
}  // namespace onepass::testing
