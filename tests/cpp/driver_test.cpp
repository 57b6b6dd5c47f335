// The kernels of every instruction set against the reference, to the bit: lengths, alignments, formats, strides.
#include "cpu/driver.h"

#include <doctest/doctest.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <iterator>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "cases.h"
#include "cpu/fpmode.h"
#include "cpu/tuning.h"
#include "reference.h"

namespace onepass::testing {
namespace {

// Calls the kernel for pieces of at most `piece` elements, as several threads would.
Problem stepped(const Isa& isa, const Tuning& tuning, Problem problem, std::int64_t piece) {
  const BoundJob bound(problem);
  const StepMode mode;
  const std::int64_t length = bound.job().length;
  for (std::int64_t at = 0; at < length; at += piece)
    isa.kernels.run(problem.setting.rule, bound.job(), at, std::min(length, at + piece), tuning);
  return problem;
}

void check(const Problem& problem, std::int64_t piece = INT64_MAX / 2) {
  const Problem want = expected(problem);
  for (const Isa& isa : supported_isas()) {
    CAPTURE(std::string_view(isa.name));
    for (const char* tuning : {"intel", "generic"}) {  // with prefetch and without
      CAPTURE(tuning);
      CHECK(difference(stepped(isa, choose_tuning(tuning), problem, piece), want) == "");
    }
  }
}

// A little more than two tiles of float32, and four of float64.
constexpr std::int64_t kLongest = 2 * 1024 + 70;

TEST_CASE("every length, in place and in tiles") {
  const Setting& cheap = setting_of("lion");
  for (const bool wide : {false, true}) {
    auto mixed = all_of(Format::bfloat16);
    mixed[kParam] = native(wide);
    for (std::int64_t length = 0; length <= kLongest; ++length) {
      check(make_problem(cheap, {length}, {.formats = all_of(native(wide)), .wide = wide}));
      check(make_problem(cheap, {length}, {.formats = mixed, .wide = wide}));
    }
  }
}

TEST_CASE("every setting, at the lengths where loops end") {
  for (const Setting& setting : kSettings)
    for (const bool wide : {false, true})
      for (const Format format : {Format::float32, Format::float64, Format::bfloat16, Format::float16})
        for (const std::int64_t length : {0, 1, 2, 3, 7, 15, 16, 17, 33, 511, 512, 513, 1023, 1024, 1025, 2049})
          check(make_problem(setting, {length}, {.formats = all_of(format), .wide = wide, .grad_factor = -0.5}));
}

TEST_CASE("states in another format, at the lengths where loops end") {
  constexpr std::pair<Format, Format> pairs[] = {{Format::bfloat16, Format::float32},
                                                 {Format::float32, Format::bfloat16},
                                                 {Format::float16, Format::float32},
                                                 {Format::float32, Format::float16}};
  for (const Setting& setting : kSettings)
    for (const auto& [param_and_grad, states] : pairs) {
      Spec spec{.formats = all_of(states), .grad_factor = -0.5};
      spec.formats[kParam] = spec.formats[kGrad] = param_and_grad;
      for (const std::int64_t length : {0, 1, 7, 15, 16, 17, 31, 32, 33, 256, 1025})
        check(make_problem(setting, {length}, spec));
    }
}

TEST_CASE("every misalignment, of all operands alike and of each by itself") {
  for (const char* setting : {"adam, amsgrad, decoupled", "lion, decay"})
    for (const bool wide : {false, true})
      for (const Format format : {native(wide), Format::float16})
        for (const std::int64_t length : {1, 17, 100, 1030})
          for (const std::size_t stagger : {0U, 1U, 4U, 40U})
            for (std::size_t misalignment = 0; misalignment < 64; ++misalignment)
              check(make_problem(
                  setting_of(setting), {length},
                  {.formats = all_of(format), .wide = wide, .misalignment = misalignment, .stagger = stagger}));
}

TEST_CASE("every mix of formats") {
  constexpr std::array formats{Format::float32, Format::float64, Format::bfloat16, Format::float16};
  for (const char* name : {"sgd, plain", "lion, decay", "rmsprop, centered", "adam, amsgrad, decoupled"}) {
    const Setting& setting = setting_of(name);
    const std::size_t operands = operands_of(setting);
    for (unsigned mix = 0; mix < 1U << (2 * operands); ++mix) {
      Spec spec{.grad_factor = 0.3};
      for (std::size_t k = 0; k < spec.formats.size(); ++k) spec.formats[k] = formats[mix >> (2 * k) & 3U];
      for (const bool wide : {false, true}) {
        spec.wide = wide;
        check(make_problem(setting, {1027}, spec));
      }
    }
  }
}

// A step that changes nothing returns every value of a format, except denormals of float32.
TEST_CASE("every 16-bit pattern through the vectorized codecs") {
  const Setting nothing = make_setting<Sgd>("sgd, lr = 0", {}, 2);
  for (const Format format : {Format::bfloat16, Format::float16}) {
    for (const bool wide : {false, true}) {
      Problem problem = make_problem(nothing, {0x10000}, {.formats = all_of(format), .wide = wide, .grad_factor = 0});
      for (std::uint32_t bits = 0; bits < 0x10000; ++bits) {
        const auto stored = static_cast<std::uint16_t>(bits);
        std::memcpy(problem.tensors[kParam].at(bits), &stored, sizeof stored);
      }
      check(problem);
    }
  }
}

// Lion's average with beta2 = 0 is the gradient.
TEST_CASE("every rounding to 16 bits") {
  const Setting keeps_gradient{"lion, beta2 = 0", RuleId::lion, {0, 0.9, 0, 0}, 1};
  constexpr std::uint32_t below[] = {0, 1, 0x7fff, 0x8000, 0x8001, 0xffff};
  for (const Format states : {Format::bfloat16, Format::float16}) {
    Spec spec{.formats = all_of(states)};
    spec.formats[kParam] = spec.formats[kGrad] = Format::float32;
    Problem problem = make_problem(keeps_gradient, {0x10000 * std::ssize(below)}, spec);
    std::int64_t at = 0;
    for (std::uint32_t upper = 0; upper < 0x10000; ++upper)
      for (const std::uint32_t lower : below) {
        const std::uint32_t bits = upper << 16 | lower;
        std::memcpy(problem.tensors[kGrad].at(at++), &bits, sizeof bits);
      }
    check(problem);
  }
}

// -- strides ---------------------------------------------------------------------------------------------------------

TEST_CASE("views, whole and in pieces") {
  for (const View& view : kViews) {
    CAPTURE(view.what);
    for (const char* setting : {"adam, amsgrad, decoupled", "sgd, nesterov"}) {
      for (const bool wide : {false, true}) {
        for (const Format format : {native(wide), Format::bfloat16}) {
          const Problem problem = make_problem(setting_of(setting), view.shape,
                                               {.formats = all_of(format), .wide = wide, .strides = view.strides});
          for (const std::int64_t piece : {std::int64_t{1} << 40, std::int64_t{1024}, std::int64_t{131}})
            check(problem, piece);
        }
      }
    }
  }
}

TEST_CASE("every pair of dimension orders, element by element and at once") {
  const std::vector<std::int64_t> shape = {2, 3, 4, 5};
  std::vector<std::vector<std::int64_t>> orders;
  std::vector<std::size_t> order = {0, 1, 2, 3};
  do {
    std::int64_t step = 1;
    auto& strides = orders.emplace_back(shape.size());
    for (const std::size_t d : order) strides[d] = std::exchange(step, step * shape[d]);
  } while (std::ranges::next_permutation(order).found);
  for (const auto& param : orders) {
    for (const auto& grad : orders) {
      const Problem problem = make_problem(setting_of("lion, decay"), shape, {.strides = {param, grad, {}}});
      check(problem);
      check(problem, 1);
    }
  }
}

// -- clamped and zeroed gradients ------------------------------------------------------------------------------------

TEST_CASE("clamped and zeroed gradients, of every setting and format, with and without followers") {
  for (const Setting& setting : kSettings)
    for (const bool wide : {false, true})
      for (const Format format : {native(wide), Format::bfloat16, Format::float16})
        for (const auto& [clip_value, zeroes] : {std::pair{0.3, false}, {kNoLimit, true}, {0.3, true}})
          for (const Followers& followers : {Followers{}, kFollowers[2]})
            for (const std::int64_t length : {0, 1, 255, 1025})
              check(make_problem(setting, {length},
                                 {.formats = all_of(format),
                                  .wide = wide,
                                  .grad_factor = -0.5,
                                  .misalignment = 6,
                                  .clip_value = clip_value,
                                  .zeroes_grad = zeroes,
                                  .followers = followers}));
}

TEST_CASE("clamped and zeroed gradients in views") {
  for (const View& view : kViews) {
    CAPTURE(view.what);
    const bool repeated = std::ranges::find(view.strides[1], 0) != view.strides[1].end();
    for (const Format format : {Format::float32, Format::bfloat16})
      check(make_problem(setting_of("adam"), view.shape,
                         {.formats = all_of(format),
                          .strides = view.strides,
                          .clip_value = 0.25,
                          .zeroes_grad = !repeated || view.what == "all sizes 1"}),
            131);
  }
}

TEST_CASE("a limit keeps NaN and bounds infinity") {
  Problem problem = make_problem(setting_of("lion, decay"), {3}, {.clip_value = 2.0});
  store(problem.tensors[kGrad], 0, std::numeric_limits<float>::quiet_NaN());
  store(problem.tensors[kGrad], 1, std::numeric_limits<float>::infinity());
  store(problem.tensors[kGrad], 2, -std::numeric_limits<float>::infinity());
  check(problem);
}

// -- followers -------------------------------------------------------------------------------------------------------

TEST_CASE("followers after every setting") {
  for (const Setting& setting : kSettings)
    for (const bool wide : {false, true})
      for (const Format format : {native(wide), Format::bfloat16})
        for (const Followers& followers : kFollowers)
          for (const std::int64_t length : {0, 1, 17, 511, 1024, 1025, 2049})
            check(make_problem(setting, {length}, {.formats = all_of(format), .wide = wide, .followers = followers}));
}

TEST_CASE("followers of every weight and flag, one and two of them") {
  for (const Followers& followers : all_followers())
    for (const bool wide : {false, true})
      for (const Format format : {native(wide), Format::bfloat16})
        for (const std::int64_t length : {0, 1, 17, 1025})
          check(make_problem(setting_of("lion, decay"), {length},
                             {.formats = all_of(format), .wide = wide, .followers = followers}));
}

TEST_CASE("followers of every format and misalignment, beside every other") {
  constexpr std::array formats{Format::float32, Format::float64, Format::bfloat16, Format::float16};
  for (const Format param : formats)
    for (const Format first : formats)
      for (const Format second : formats)
        for (const bool wide : {false, true})
          for (std::size_t misalignment = 0; misalignment < 64; misalignment += 7) {
            Spec spec{.formats = all_of(param), .wide = wide, .misalignment = misalignment, .stagger = 1};
            spec.formats[kFirstFollower] = first;
            spec.formats[kFirstFollower + 1] = second;
            spec.followers = {Follower{0.3, true}, Follower{0.9, false}};
            check(make_problem(setting_of("adam"), {1030}, spec), 512);
          }
}

TEST_CASE("followers in views, whole and in pieces") {
  for (const View& view : kViews) {
    CAPTURE(view.what);
    for (const bool wide : {false, true}) {
      for (const Followers& followers : kFollowers) {
        const Problem problem = make_problem(
            setting_of("sgd, nesterov"), view.shape,
            {.formats = all_of(native(wide)), .wide = wide, .strides = view.strides, .followers = followers});
        for (const std::int64_t piece : {std::int64_t{1} << 40, std::int64_t{1024}, std::int64_t{131}})
          check(problem, piece);
      }
    }
  }
}

// -- masters ---------------------------------------------------------------------------------------------------------

// The combinations of a master and the format of its parameter.
constexpr std::pair<Master, Format> kMasters[] = {
    {Master::low_bits, Format::bfloat16}, {Master::whole, Format::bfloat16}, {Master::whole, Format::float16}};

TEST_CASE("masters in every setting, at the lengths where loops end, misaligned") {
  for (const Setting& setting : kSettings)
    for (const auto& [master, format] : kMasters)
      for (const Format states : {Format::float32, Format::bfloat16})
        for (const std::int64_t length : {0, 1, 17, 255, 256, 257, 511, 1030}) {
          Spec spec{.formats = all_of(states), .grad_factor = -0.5, .misalignment = 3, .stagger = 1, .master = master};
          spec.formats[kParam] = spec.formats[kGrad] = format;
          check(make_problem(setting, {length}, spec));
        }
}

TEST_CASE("masters in views, whole and in pieces, with followers, clipping and zeroed gradients") {
  for (const View& view : kViews) {
    CAPTURE(view.what);
    for (const auto& [master, format] : kMasters)
      for (const Format follower : {Format::float32, Format::bfloat16, Format::float16}) {
        std::vector<Followers> all(std::begin(kFollowers), std::end(kFollowers));
        all.push_back({Follower{1.0, false}, Follower{1.0, false}});
        for (const Followers& followers : all) {
          if (follower != Format::float32 && &followers != &all.back() && &followers != &all.front()) continue;
          Spec spec{.strides = view.strides, .clip_value = 0.3, .followers = followers, .master = master};
          spec.zeroes_grad = std::ranges::find(view.strides[kGrad], 0) == view.strides[kGrad].end();
          spec.formats[kParam] = spec.formats[kGrad] = format;
          spec.formats[kFirstFollower] = spec.formats[kFirstFollower + 1] = follower;
          const Problem problem = make_problem(setting_of("sgd, nesterov"), view.shape, spec);
          for (const std::int64_t piece : {std::int64_t{1} << 40, std::int64_t{131}}) check(problem, piece);
        }
      }
  }
}

// Exact values, without the reference: weights of 0 and 1, and halves between powers of two.
TEST_CASE("the values of a follower") {
  const Setting still = make_setting<Sgd>("sgd, lr = 0", {}, 2);
  struct {
    double param, follower, weight, want;
  } const table[] = {
      {3.0, 0.1f, 0.0, 0.1f}, {0.1f, 1e8, 1.0, 0.1f}, {4.0, 2.0, 0.5, 3.0},
      {1.0, 5.0, 0.25, 4.0},  {1.0, 5.0, 0.75, 2.0},
  };
  for (const auto& row : table)
    for (const bool sets_param : {false, true})
      for (const bool wide : {false, true}) {
        Problem problem = make_problem(
            still, {100},
            {.formats = all_of(native(wide)), .wide = wide, .followers = {Follower{row.weight, sets_param}}});
        Problem want = problem;
        for (std::int64_t i = 0; i < 100; ++i) {
          store(problem.tensors[kParam], i, row.param);
          store(problem.tensors[kFirstFollower], i, row.follower);
          store(want.tensors[kParam], i, sets_param ? row.want : row.param);
          store(want.tensors[kFirstFollower], i, row.want);
        }
        for (const Isa& isa : supported_isas())
          CHECK(difference(stepped(isa, active_tuning(), problem, 1000), want) == "");
      }
}

// The parameter 1 and followers 5 and 9, with weight 1/2. The second one follows p or the first one, by the flag of the
// first.
TEST_CASE("followers are updated in their order") {
  const Setting still = make_setting<Sgd>("sgd, lr = 0", {}, 2);
  struct {
    bool first_sets, second_sets;
    double param, first, second;
  } const table[] = {{false, false, 1.0, 3.0, 5.0},
                     {true, false, 3.0, 3.0, 6.0},
                     {false, true, 5.0, 3.0, 5.0},
                     {true, true, 6.0, 3.0, 6.0}};
  for (const auto& row : table) {
    Problem problem =
        make_problem(still, {100}, {.followers = {Follower{0.5, row.first_sets}, Follower{0.5, row.second_sets}}});
    Problem want = problem;
    for (std::int64_t i = 0; i < 100; ++i) {
      store(problem.tensors[kParam], i, 1.0);
      store(problem.tensors[kFirstFollower], i, 5.0);
      store(problem.tensors[kFirstFollower + 1], i, 9.0);
      store(want.tensors[kParam], i, row.param);
      store(want.tensors[kFirstFollower], i, row.first);
      store(want.tensors[kFirstFollower + 1], i, row.second);
    }
    for (const Isa& isa : supported_isas()) CHECK(difference(stepped(isa, active_tuning(), problem, 1000), want) == "");
  }
}

// A bfloat16 parameter stores 1 + 2^-10 as 1.
TEST_CASE("a follower that sets the parameter is updated from it before it is rounded, others from what is stored") {
  const Setting adding = make_setting<Sgd>("sgd, lr = 2^-10", {.lr = 0x1p-10}, 2);
  for (const bool sets_param : {false, true}) {
    Spec spec{.followers = {Follower{0.5, sets_param}}};
    spec.formats[kParam] = Format::bfloat16;
    Problem problem = make_problem(adding, {100}, spec);
    for (std::int64_t i = 0; i < 100; ++i) {
      store(problem.tensors[kParam], i, 1.0);
      store(problem.tensors[kGrad], i, -1.0);
      store(problem.tensors[kFirstFollower], i, 1.0);
    }
    Problem want = problem;
    if (sets_param)
      for (std::int64_t i = 0; i < 100; ++i) store(want.tensors[kFirstFollower], i, 1.0 + 0x1p-11);
    for (const Isa& isa : supported_isas()) CHECK(difference(stepped(isa, active_tuning(), problem, 1000), want) == "");
  }
}

// -- aliasing --------------------------------------------------------------------------------------------------------

TEST_CASE("a gradient that is the parameter itself") {
  for (const Setting& setting : kSettings) {
    for (const Format format : {Format::float32, Format::float16}) {
      const Problem apart = make_problem(setting, {1500}, {.formats = all_of(format)});
      Problem same = apart;
      same.tensors[kGrad] = same.tensors[kParam];
      const Problem want = expected(same);
      for (const Isa& isa : supported_isas()) {
        CAPTURE(std::string_view(isa.name));
        Problem got = apart;
        {
          const BoundJob bound(got);
          Job job = bound.job();
          job.operands[kGrad] = job.operands[kParam];
          const StepMode mode;
          isa.kernels.run(setting.rule, job, 0, job.length, active_tuning());
        }
        got.tensors[kGrad] = want.tensors[kGrad];  // not part of this job
        CHECK(difference(got, want) == "");
      }
    }
  }
}

}  // namespace
}  // namespace onepass::testing
