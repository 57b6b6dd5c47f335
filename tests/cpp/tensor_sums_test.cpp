// Rules whose update depends on sums over the whole tensor: run_step against sums in long double.
#include <doctest/doctest.h>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <utility>
#include <vector>

#include "cpu/dispatch.h"
#include "cpu/step.h"
#include "cpu/team.h"
#include "with_sums.h"

namespace onepass::testing {
namespace {

using enum Format;

// Steps a problem with every instruction set and several numbers of threads, which all have the same bits.
void check(const Problem& problem) {
  force_bytes_per_thread(1 << 12);
  const Problem want = expected_with_sums(problem);
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
  force_bytes_per_thread(0);
  for (const Problem& got : all) {
    CHECK(difference(got, all.front()) == "");
    for (std::size_t n = 0; n < kMaxScalars; ++n) {
      const double scalar = got.setting.scalars[n], first = all.front().setting.scalars[n];
      CHECK((scalar == first || (std::isnan(scalar) && std::isnan(first))));
    }
  }
  check_near(all.front(), want);
}

TEST_CASE("every format and length") {
  for (const Setting& setting : settings_with_sums()) {
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
  for (const Setting& setting : settings_with_sums()) {
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
  for (const Setting& setting : settings_with_sums()) {
    CAPTURE(setting.what);
    std::vector<Problem> got;
    for (const std::int64_t length : {5, 0, 20'000, 1, 333, 40'000}) got.push_back(make_problem(setting, {length}));
    std::vector<Problem> want;
    for (const Problem& problem : got) want.push_back(expected_with_sums(problem));
    {
      std::deque<BoundJob> bound;
      std::vector<Job> jobs;
      for (Problem& problem : got) jobs.push_back(bound.emplace_back(problem).job());
      force_bytes_per_thread(1 << 12);
      run_step(setting.rule, jobs, 3);
      force_bytes_per_thread(0);
    }
    for (std::size_t i = 0; i < got.size(); ++i) CHECK(difference(got[i], want[i]) == "");
  }
}

TEST_CASE("shards have the sums of the tensor that they are together") {
  for (const Setting& setting : settings_with_sums()) {
    CAPTURE(setting.what);
    for (const bool wide : {false, true}) {
      Spec spec{.wide = wide};
      spec.formats.fill(wide ? float64 : float32);
      Problem got = make_problem(setting, {70'001}, spec);
      const Problem want = expected_with_sums(got);
      {
        const BoundJob bound(got);
        std::vector<Job> shards;
        std::int64_t begin = 0;
        for (const std::int64_t length : {40'000, 0, 30'001}) {
          Job& shard = shards.emplace_back(bound.job());
          for (Operand& operand : shard.operands)
            if (operand.data != nullptr) operand.data += begin * static_cast<std::int64_t>(size_of(operand.format));
          shard.whole = std::exchange(shard.length, length);
          begin += length;
        }
        const std::size_t count = info_of(setting.rule).sums;
        const std::vector<double> sums = sum_shards(setting.rule, shards, 2);
        REQUIRE(sums.size() == 3 * count);
        std::vector<double> totals;
        for (std::size_t k = 0; k < count; ++k) totals.push_back(sums[k] + sums[count + k] + sums[2 * count + k]);
        std::vector<ConstantsBuffer> constants(shards.size());
        for (std::size_t i = 0; i < shards.size(); ++i)
          complete_shard(setting.rule, shards[i], totals.data(), constants[i]);
        run_step(setting.rule, shards, 2);
      }
      check_near(got, want);
    }
  }
}

}  // namespace
}  // namespace onepass::testing
