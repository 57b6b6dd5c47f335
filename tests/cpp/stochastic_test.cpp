// Stochastic rounding to 16 bits (formats/stochastic.h) against its definition.
#include "formats/stochastic.h"

#include <doctest/doctest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <utility>
#include <vector>

#include "cpu/fpmode.h"
#include "cpu/step.h"
#include "cpu/stochastic.h"
#include "job.h"
#include "rules/table.h"

namespace onepass {
namespace {

constexpr std::uint32_t kRandom[] = {0, 1, 0x7fff, 0x8000, 0xfffe, 0xffff};

// Calls visit(a, b) for each two neighbouring numbers of a format that are not denormal in float32, from zero upwards.
template <class Codec, class Visit>
void for_each_interval(Visit&& visit) {
  std::uint16_t code = 0;
  for (float value = 0; !std::isinf(value);) {
    float next = value;
    while (next == value || std::abs(next) < 0x1p-126F) next = Codec::template decode<float>(++code);
    visit(value, next);
    value = next;
  }
}

template <class Codec>
void check_numbers() {
  for_each_interval<Codec>([](float a, float) {
    for (const std::uint32_t random : kRandom) {
      CHECK(rounded(Codec{}, a, random) == a);
      CHECK(rounded(Codec{}, -a, random) == -a);
      CHECK(std::signbit(rounded(Codec{}, -a, random)));
    }
  });
  const float infinity = std::numeric_limits<float>::infinity();
  for (const std::uint32_t random : kRandom) {
    CHECK(rounded(Codec{}, infinity, random) == infinity);
    CHECK(rounded(Codec{}, -infinity, random) == -infinity);
    CHECK(std::isnan(rounded(Codec{}, std::numeric_limits<float>::quiet_NaN(), random)));
  }
}

// `width`: the random bits that a rounding uses, which are the upper ones of 16.
template <class Codec>
void check_intervals(int width) {
  for_each_interval<Codec>([&](float a, float b) {
    if (a == 0 || std::isinf(b)) return;
    for (const double part : {1.0 / 256, 0.25, 0.5, 255.0 / 256}) {
      const auto value = static_cast<float>(a + part * (static_cast<double>(b) - a));
      const auto first = static_cast<std::uint32_t>(std::ldexp(1.0 - part, 16));  // the smallest that rounds up
      CHECK(rounded(Codec{}, value, 0) == a);
      CHECK(rounded(Codec{}, value, first - (1U << (16 - width))) == a);
      CHECK(rounded(Codec{}, value, first) == b);
      CHECK(rounded(Codec{}, -value, 0xffff) == -b);
    }
  });
}

TEST_CASE("hashes of places in a block do not differ by a multiple of 2^13") {
  for (std::uint32_t a = 0; a < kBlockLength; ++a)
    for (std::uint32_t b = 0; b < a; ++b) CHECK(std::countr_zero(hash_of_place(a) - hash_of_place(b)) < 13);
}

TEST_CASE("numbers that a format has stay as they are, whatever the random bits") {
  const StepMode mode;
  check_numbers<BFloat16>();
  check_numbers<Float16>();
}

TEST_CASE("numbers between two are rounded up by as many of the random numbers as their distance") {
  const StepMode mode;
  check_intervals<BFloat16>(16);
  check_intervals<Float16>(13);
}

TEST_CASE("a number above the largest becomes infinite with the probability of its distance") {
  const StepMode mode;
  CHECK(Float16::encode(rounded(Float16{}, 65504.0F + 16.0F, 0x7fff)) == 0x7bff);
  CHECK(Float16::encode(rounded(Float16{}, 65504.0F + 16.0F, 0x8000)) == 0x7c00);
  CHECK(Float16::encode(rounded(Float16{}, 65536.0F, 0)) == 0x7c00);
  const auto largest = BFloat16::decode<float>(std::uint16_t{0x7f7f});
  CHECK(rounded(BFloat16{}, std::nextafter(largest, 2 * largest), 0xfffe) == largest);
  CHECK(std::isinf(rounded(BFloat16{}, std::nextafter(largest, 2 * largest), 0xffff)));
}

TEST_CASE("a range has the same bits in parts, also where the index passes 2^32") {
  const StepMode mode;
  const std::int64_t first = (std::int64_t{1} << 32) - 300;
  std::vector<float> whole(1000);
  for (std::size_t i = 0; i < whole.size(); ++i) whole[i] = 1.0F + static_cast<float>(i) * 0x1.3p-12F;
  std::vector<float> parts = whole;
  for (const std::size_t stream : {std::size_t{0}, std::size_t{3}, kParamStream}) {
    round_run<BFloat16>(7, stream, first, whole.data(), 1000);
    for (std::int64_t at = 0, n = 1; at < 1000; at += n, n = n * 2 % 331 + 1)
      round_run<BFloat16>(7, stream, first + at, parts.data() + at, std::min(n, 1000 - at));
    CHECK(whole == parts);
  }
}

// A job of bfloat16 operands, whose elements have indices from `first` on.
struct Problem {
  explicit Problem(std::size_t n) : param(n), grad(n), state(n) {
    for (std::size_t i = 0; i < n; ++i) {
      param[i] = BFloat16::encode(1.0F + static_cast<float>(i % 97) * 0.01F);
      grad[i] = BFloat16::encode(0.1F - static_cast<float>(i % 31) * 0.007F);
      state[i] = BFloat16::encode(static_cast<float>(i % 13) * 0.013F);
    }
  }

  // Returns the job of elements [begin, end).
  Job job(std::int64_t begin, std::int64_t end, std::int64_t first, const void* constants) {
    Job job;
    job.length = end - begin;
    job.constants = constants;
    for (const auto& [k, data] : {std::pair{kParam, &param}, {kGrad, &grad}, {kFirstState, &state}})
      job.operands[k] = {reinterpret_cast<std::byte*>(data->data() + begin), Format::bfloat16};
    job.rounding = {.stochastic = true, .first = first + begin, .key = 0x1234567890abcdef};
    return job;
  }

  bool operator==(const Problem&) const = default;

  std::vector<std::uint16_t> param, grad, state;
};

TEST_CASE("a step has the same bits in parts, also where the index passes 2^32") {
  const RuleInfo& info = info_of(RuleId::sgd);
  alignas(64) std::byte constants[kMaxConstantBytes];
  const double hyper[kMaxHyper] = {0.01, 0.9, 0.1, 0.01, 1.0};
  info.prepare(hyper, 2.0, nullptr, false, constants);
  constexpr std::int64_t n = 5000;
  for (const std::int64_t first : {std::int64_t{0}, (std::int64_t{1} << 32) - 1300}) {
    Problem whole(n);
    Problem parts(n);
    Problem nearest(n);
    Job plain = nearest.job(0, n, first, constants);
    plain.rounding = {};
    run_step(RuleId::sgd, std::vector{whole.job(0, n, first, constants)}, 1);
    run_step(RuleId::sgd, std::vector{plain}, 1);
    std::vector<Job> jobs;
    for (std::int64_t at = 0, length = 1; at < n; at += length, length = length * 2 % 1331 + 1)
      jobs.push_back(parts.job(at, std::min(n, at + length), first, constants));
    run_step(RuleId::sgd, jobs, 3);
    CHECK(whole == parts);
    CHECK(whole.param != nearest.param);
    CHECK(whole.state != nearest.state);
  }
}

}  // namespace
}  // namespace onepass
