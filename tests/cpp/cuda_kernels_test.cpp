// The CUDA kernels, imitated on the CPU, against the reference, to the bit: lengths, chunks, alignments, formats,
// strides, and numbers in the GPU's memory.
#include <doctest/doctest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <deque>
#include <limits>
#include <optional>
#include <string_view>
#include <utility>
#include <vector>

#include "cpu/fpmode.h"
#include "cuda/kernel.h"
#include "cuda/step.h"
#include "reference.h"

extern "C" const onepass::cuda::Backend* onepass_emulated_backend();

namespace onepass::testing {
namespace {

using cuda::Backend;
using cuda::DeviceJob;
using cuda::Inputs;
using cuda::LargeTable;
using cuda::Number;
using cuda::Work;

// The imitation, with the shortest chunks or with the longest.
constexpr std::int64_t kShort = 4096;
constexpr std::int64_t kLong = 16384;
Backend backend(std::int64_t chunk) {
  Backend backend = *onepass_emulated_backend();
  backend.multiprocessors = chunk == kShort ? [](int) { return 1 << 30; } : [](int) { return 0; };
  return backend;
}

// Memory for the constants that are made on the GPU, and a guard behind it.
class Workspace {
 public:
  explicit Workspace(std::size_t size) : words_(size / sizeof(std::uint64_t) + 1, kGuard) {}
  ~Workspace() { CHECK(words_.back() == kGuard); }
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  std::byte* data() { return reinterpret_cast<std::byte*>(words_.data()); }

 private:
  static constexpr std::uint64_t kGuard = 0x5a5a5a5a5a5a5a5a;
  std::vector<std::uint64_t> words_;
};

void run(RuleId rule, const std::vector<DeviceJob>& jobs, std::int64_t chunk = kShort, const Inputs& inputs = {}) {
  Workspace workspace(cuda::workspace_size(rule, jobs));
  cuda::run_step(backend(chunk), rule, jobs, inputs, workspace.data(), 0, nullptr);
}

void step(std::vector<Problem>& problems, std::int64_t chunk) {
  std::deque<BoundJob> bound;
  std::vector<DeviceJob> jobs;
  for (Problem& problem : problems) jobs.push_back({.job = bound.emplace_back(problem).without_sums()});
  run(problems.front().setting.rule, jobs, chunk);
}

// Steps these problems, all of one rule, at once.
void check(const std::vector<Problem>& problems, std::int64_t chunk = kShort) {
  std::vector<Problem> got = problems;
  step(got, chunk);
  for (std::size_t i = 0; i < problems.size(); ++i) {
    CAPTURE(i);
    CHECK(difference(got[i], expected(problems[i])) == "");
  }
}

constexpr std::array kFormats{Format::float32, Format::float64, Format::bfloat16, Format::float16};

// For each operand a number of elements before it, below a vector's width.
std::array<std::size_t, kMaxOperands> some_elements(std::uint64_t seed) {
  std::array<std::size_t, kMaxOperands> ahead{};
  for (std::size_t k = 0; k < ahead.size(); ++k) ahead[k] = scramble(seed * kMaxOperands + k) % 4;
  return ahead;
}

// -- packed tensors --------------------------------------------------------------------------------------------------

TEST_CASE("every setting and format, at the lengths where vectors, blocks and chunks end") {
  for (const Setting& setting : kSettings)
    for (const bool wide : {false, true}) {
      std::vector<Problem> problems;
      for (const Format format : kFormats)
        for (const std::int64_t length :
             {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 255, 256, 257, 511, 512, 513, 1023, 1024, 1025, 4095, 4096, 4097, 8195})
          problems.push_back(
              make_problem(setting, {length}, {.formats = all_of(format), .wide = wide, .grad_factor = -0.5}));
      check(problems);
    }
}

TEST_CASE("the ends of chunks, short and long, wherever the first vector begins") {
  for (const char* setting : {"lion, decay", "adam, amsgrad, decoupled"})
    for (const bool wide : {false, true})
      for (const Format format : {native(wide), Format::bfloat16})
        for (const std::int64_t chunk : {kShort, kLong}) {
          std::vector<Problem> problems;
          for (const std::size_t ahead : {0U, 1U, 2U, 3U})
            for (const std::int64_t length :
                 {chunk - 1, chunk, chunk + 1, chunk + 2, chunk + 3, chunk + 4, 2 * chunk}) {
              Spec spec{.formats = all_of(format), .wide = wide};
              spec.ahead.fill(ahead);
              problems.push_back(make_problem(setting_of(setting), {length}, spec));
            }
          check(problems, chunk);
        }
}

TEST_CASE("every setting and format, misaligned all alike") {
  for (const Setting& setting : kSettings)
    for (const bool wide : {false, true}) {
      std::vector<Problem> problems;
      for (const Format format : kFormats)
        for (const std::size_t ahead : {1U, 2U, 3U})
          for (const std::int64_t length : {1, 2, 3, 4, 5, 6, 7, 8, 1030}) {
            Spec spec{.formats = all_of(format), .wide = wide, .grad_factor = 2.0};
            spec.ahead.fill(ahead);
            problems.push_back(make_problem(setting, {length}, spec));
          }
      check(problems);
    }
}

TEST_CASE("every misalignment of each operand by itself") {
  const Setting& setting = setting_of("lion, decay");
  for (const bool wide : {false, true})
    for (unsigned narrow = 0; narrow < 2 * 2 * 2; ++narrow) {
      std::vector<Problem> problems;
      for (unsigned ahead = 0; ahead < 4 * 4 * 4; ++ahead) {
        Spec spec{.formats = all_of(native(wide)), .wide = wide};
        for (std::size_t k = 0; k < operands_of(setting); ++k) {
          if ((narrow >> k & 1U) != 0) spec.formats[k] = Format::bfloat16;
          spec.ahead[k] = ahead >> (2 * k) & 3U;
        }
        for (const std::int64_t length : {1, 2, 3, 4, 7, 37}) problems.push_back(make_problem(setting, {length}, spec));
      }
      check(problems);
    }
}

TEST_CASE("every mix of formats, aligned or not") {
  for (const char* name : {"sgd, plain", "lion, decay", "rmsprop, centered", "adam, amsgrad, decoupled"}) {
    const Setting& setting = setting_of(name);
    const unsigned mixes = 1U << (2 * operands_of(setting));
    for (const bool wide : {false, true}) {
      std::vector<Problem> problems;
      for (unsigned mix = 0; mix < mixes; ++mix) {
        Spec spec{.wide = wide, .grad_factor = 0.3};
        for (std::size_t k = 0; k < spec.formats.size(); ++k) spec.formats[k] = kFormats[mix >> (2 * k) & 3U];
        problems.push_back(make_problem(setting, {41}, spec));
        spec.ahead = some_elements(mix);
        problems.push_back(make_problem(setting, {41}, spec));
      }
      check(problems);
    }
  }
}

// A step that changes nothing returns every value of a format, except denormals of float32.
TEST_CASE("every 16-bit pattern through vectors and single elements") {
  const Setting nothing = make_setting<Sgd>("sgd, lr = 0", {}, 2);
  for (const Format format : {Format::bfloat16, Format::float16})
    for (const bool wide : {false, true}) {
      std::vector<Problem> problems;
      for (const std::int64_t stride : {1, 2}) {
        Problem& problem = problems.emplace_back(make_problem(
            nothing, {0x10000},
            {.formats = all_of(format), .wide = wide, .grad_factor = 0, .strides = {{{stride}, {stride}, {}}}}));
        for (std::uint32_t bits = 0; bits < 0x10000; ++bits) {
          const auto stored = static_cast<std::uint16_t>(bits);
          std::memcpy(problem.tensors[kParam].at(bits * stride), &stored, sizeof stored);
        }
      }
      check(problems);
    }
}

// -- masters ---------------------------------------------------------------------------------------------------------

TEST_CASE("masters in every setting, aligned or not") {
  constexpr std::pair<Master, Format> masters[] = {
      {Master::low_bits, Format::bfloat16}, {Master::whole, Format::bfloat16}, {Master::whole, Format::float16}};
  for (const Setting& setting : kSettings) {
    std::vector<Problem> problems;
    for (const auto& [master, format] : masters)
      for (const std::int64_t length : {0, 1, 3, 4, 5, 41, 1030, 4097})
        for (const std::uint64_t seed : {0U, 1U, 2U}) {
          Spec spec{.grad_factor = 0.3, .master = master};
          spec.formats[kParam] = spec.formats[kGrad] = format;
          if (seed != 0) spec.ahead = some_elements(seed);
          problems.push_back(make_problem(setting, {length}, spec));
        }
    check(problems);
  }
}

TEST_CASE("masters in views, with followers") {
  for (const Master master : {Master::low_bits, Master::whole})
    for (const Format follower : {Format::float32, Format::bfloat16})
      for (const double weight : {0.3, 1.0}) {
        std::vector<Problem> problems;
        for (const View& view : kViews) {
          Spec spec{.strides = view.strides, .followers = {Follower{0.3, true}, Follower{weight, false}}};
          spec.master = master;
          spec.formats[kParam] = spec.formats[kGrad] = Format::bfloat16;
          spec.formats[kFirstFollower + 1] = follower;
          problems.push_back(make_problem(setting_of("adam"), view.shape, spec));
          spec.strides = {};
          problems.push_back(make_problem(setting_of("adam"), {1030}, spec));
        }
        check(problems);
      }
}

// -- strides ---------------------------------------------------------------------------------------------------------

TEST_CASE("views") {
  for (const char* setting : {"adam, amsgrad, decoupled", "sgd, nesterov"})
    for (const std::int64_t chunk : {kShort, kLong}) {
      std::vector<Problem> problems;
      for (const View& view : kViews)
        for (const bool wide : {false, true})
          for (const Format format : {native(wide), Format::bfloat16})
            problems.push_back(make_problem(setting_of(setting), view.shape,
                                            {.formats = all_of(format), .wide = wide, .strides = view.strides}));
      check(problems, chunk);
    }
}

// Tensors of which only the first or the last elements exist. Only the chunks there are stepped.
enum class End { first, last };

template <class Rule, class T>
void step_chunks(const Job& job, End end, std::int64_t elements) {
  static LargeTable table;
  Backend recorder = backend(kShort);
  recorder.launch = [](Work, RuleId, bool, const LargeTable& launched, void*) -> const char* {
    table = launched;
    return nullptr;
  };
  const std::vector<DeviceJob> jobs{{.job = job}};
  run_step(recorder, RuleId::lion, jobs, {}, nullptr, 0, nullptr);
  const StepMode mode;
  const auto chunks = static_cast<std::uint32_t>((elements + kShort - 1) / kShort);
  const std::uint32_t first = end == End::first ? 0 : table.header.blocks - chunks;
  for (std::uint32_t block = first; block < first + chunks; ++block)
    for (std::uint32_t thread = 0; thread < cuda::kThreads; ++thread) step_chunk<Rule, T>(table, block, thread);
}

void step_chunks(const Job& job, End end, std::int64_t elements) {
  (job.wide ? step_chunks<Lion, double> : step_chunks<Lion, float>)(job, end, elements);
}

// Returns the address of the element that is this many elements earlier.
std::byte* before(const Operand& operand, std::int64_t elements) {
  const std::uint64_t bytes = static_cast<std::uint64_t>(elements) * size_of(operand.format);
  return reinterpret_cast<std::byte*>(reinterpret_cast<std::uintptr_t>(operand.data) - bytes);
}

TEST_CASE("elements beyond the range of 32 bits") {
  const Setting& setting = setting_of("lion, decay");
  constexpr std::int64_t missing = kShort << 22;
  for (const bool wide : {false, true})
    for (const Format format : {native(wide), Format::bfloat16, Format::float64})
      for (const std::int64_t head : {0, 1}) {
        const bool has_vectors = size_of(format) <= size_of(native(wide));
        if (!has_vectors && head != 0) continue;
        Problem problem = make_problem(setting, {9001}, {.formats = all_of(format), .wide = wide});
        const Problem want = expected(problem);
        const BoundJob bound(problem);
        Job job = bound.job();
        job.length += missing + head;
        for (Operand& operand : job.operands)
          if (operand.data != nullptr) operand.data = before(operand, missing + head);
        step_chunks(job, End::last, 9001);
        CHECK(difference(problem, want) == "");
      }
}

TEST_CASE("strided elements beyond the range of 32 bits") {
  const Setting& setting = setting_of("lion, decay");
  constexpr std::int64_t columns = 2048;
  constexpr std::int64_t missing = std::int64_t{1} << 22;  // rows
  for (const bool wide : {false, true}) {
    Problem problem = make_problem(
        setting, {6, columns},
        {.formats = all_of(native(wide)), .wide = wide, .strides = {{{columns + 5, 1}, {1, 7}, {columns, 1}}}});
    const Problem want = expected(problem);
    const BoundJob bound(problem);
    Job job = bound.job();
    REQUIRE(job.layout != nullptr);
    Layout layout = *job.layout;
    REQUIRE(layout.shape == std::vector<std::int64_t>{6, columns});
    layout.shape[0] += missing;
    job.layout = &layout;
    job.length += missing * columns;
    for (std::size_t k = 0; k < kMaxOperands; ++k)
      if (job.operands[k].data != nullptr)
        job.operands[k].data = before(job.operands[k], missing * layout.strides[k][0]);
    step_chunks(job, End::last, 6 * columns);
    CHECK(difference(problem, want) == "");
  }
}

TEST_CASE("a dimension beyond the range of 32 bits") {
  const Setting& setting = setting_of("lion, decay");
  constexpr std::int64_t existing = 3 * kShort;
  constexpr std::int64_t columns = (std::int64_t{1} << 33) + kShort;
  for (const End end : {End::first, End::last})
    for (const bool wide : {false, true}) {
      Problem problem = make_problem(setting, {existing}, {.formats = all_of(native(wide)), .wide = wide});
      const Problem want = expected(problem);
      const BoundJob bound(problem);
      Job job = bound.job();
      Layout layout{.shape = {3, columns}, .strides = {}};
      for (std::size_t k = 0; k < kMaxOperands; ++k) {
        if (job.operands[k].data == nullptr) continue;
        layout.strides[k] = {columns + static_cast<std::int64_t>(k), 1};
        if (end == End::last)
          job.operands[k].data = before(job.operands[k], 2 * layout.strides[k][0] + columns - existing);
      }
      job.layout = &layout;
      job.length = 3 * columns;
      step_chunks(job, end, existing);
      CHECK(difference(problem, want) == "");
    }
}

// -- followers -------------------------------------------------------------------------------------------------------

TEST_CASE("followers after every setting") {
  for (const Setting& setting : kSettings) {
    std::vector<Problem> problems;
    for (const bool wide : {false, true})
      for (const Format format : {native(wide), Format::bfloat16})
        for (const Followers& followers : kFollowers)
          for (const std::int64_t length : {0, 1, 3, 4, 17, 1025})
            problems.push_back(
                make_problem(setting, {length}, {.formats = all_of(format), .wide = wide, .followers = followers}));
    check(problems);
  }
}

TEST_CASE("followers of every weight and flag, one and two of them") {
  std::vector<Problem> problems;
  for (const Followers& followers : all_followers())
    for (const bool wide : {false, true})
      for (const Format format : {native(wide), Format::bfloat16})
        for (const std::int64_t length : {0, 1, 6, 1030})
          problems.push_back(make_problem(setting_of("lion, decay"), {length},
                                          {.formats = all_of(format), .wide = wide, .followers = followers}));
  check(problems);
}

TEST_CASE("followers of every format and misalignment, beside every other") {
  for (const bool wide : {false, true})
    for (const Format param : kFormats) {
      std::vector<Problem> problems;
      for (const Format first : kFormats)
        for (const Format second : kFormats)
          for (std::uint64_t ahead = 0; ahead < 64; ++ahead) {
            Spec spec{.formats = all_of(param), .wide = wide, .ahead = some_elements(ahead)};
            spec.formats[kFirstFollower] = first;
            spec.formats[kFirstFollower + 1] = second;
            spec.followers = {Follower{0.3, true}, Follower{0.9, false}};
            problems.push_back(make_problem(setting_of("adam"), {70}, spec));
          }
      check(problems);
    }
}

TEST_CASE("followers in views") {
  std::vector<Problem> problems;
  for (const View& view : kViews)
    for (const bool wide : {false, true})
      for (const Followers& followers : kFollowers)
        problems.push_back(make_problem(
            setting_of("sgd, nesterov"), view.shape,
            {.formats = all_of(native(wide)), .wide = wide, .strides = view.strides, .followers = followers}));
  check(problems);
}

// -- clamped and zeroed gradients ------------------------------------------------------------------------------------

TEST_CASE("clamped and zeroed gradients, of every setting and format, with and without followers") {
  for (const Setting& setting : kSettings)
    for (const auto& [clip_value, zeroes] : {std::pair{0.3, false}, {kNoLimit, true}, {0.3, true}}) {
      std::vector<Problem> problems;
      for (const bool wide : {false, true})
        for (const Format format : kFormats)
          for (const Followers& followers : {Followers{}, kFollowers[2]})
            for (const std::size_t ahead : {0U, 3U})
              for (const std::int64_t length : {0, 1, 5, 1025, 4100}) {
                if (length > kShort && setting.rule != RuleId::lion) continue;  // chunks end alike in all rules
                Spec spec{.formats = all_of(format),
                          .wide = wide,
                          .grad_factor = -0.5,
                          .clip_value = clip_value,
                          .zeroes_grad = zeroes,
                          .followers = followers};
                spec.ahead.fill(ahead);
                problems.push_back(make_problem(setting, {length}, spec));
              }
      check(problems);
    }
}

TEST_CASE("clamped and zeroed gradients in views") {
  for (const View& view : kViews) {
    CAPTURE(view.what);
    const bool repeated = std::ranges::find(view.strides[1], 0) != view.strides[1].end();
    std::vector<Problem> problems;
    for (const Format format : {Format::float32, Format::bfloat16})
      problems.push_back(make_problem(setting_of("adam"), view.shape,
                                      {.formats = all_of(format),
                                       .strides = view.strides,
                                       .clip_value = 0.25,
                                       .zeroes_grad = !repeated || view.what == "all sizes 1"}));
    check(problems);
  }
}

TEST_CASE("a limit keeps NaN and bounds infinity") {
  using Float = std::numeric_limits<float>;
  Problem problem = make_problem(setting_of("lion, decay"), {4}, {.clip_value = 2.0});
  store(problem.tensors[kGrad], 0, Float::quiet_NaN());
  store(problem.tensors[kGrad], 1, Float::infinity());
  store(problem.tensors[kGrad], 2, -Float::infinity());
  check({problem});
}

// -- models ----------------------------------------------------------------------------------------------------------

TEST_CASE("tensors of all kinds in one step, in one table or in many") {
  for (const std::uint64_t tensors : {50U, 3000U})
    for (const std::int64_t chunk : {kShort, kLong}) {
      std::vector<Problem> problems;
      for (std::uint64_t i = 0; i < tensors; ++i) {
        const std::uint64_t random = scramble(i);
        constexpr const char* settings[] = {"adam", "adam, amsgrad", "adam, amsgrad, decoupled"};
        Spec spec{.wide = random % 7 == 0, .grad_factor = random % 3 == 0 ? -1.0 : 1.0};
        spec.formats = all_of(native(spec.wide));
        if (random % 5 == 0) spec.formats[random % 4] = Format::bfloat16;
        if (random % 4 == 0) spec.ahead = some_elements(random);
        if (random % 11 == 0) spec.followers = kFollowers[random / 11 % std::size(kFollowers)];
        const auto rows = static_cast<std::int64_t>(random >> 8 & 31U);
        if (random % 13 == 0) spec.strides[kGrad] = {1, rows};
        problems.push_back(make_problem(setting_of(settings[random % 3]), {rows, i % 100 == 0 ? 700 : 7}, spec));
      }
      check(problems, chunk);
    }
}

TEST_CASE("a gradient that is the parameter itself") {
  for (const Setting& setting : kSettings)
    for (const Format format : {Format::float32, Format::float16}) {
      const Problem apart = make_problem(setting, {1500}, {.formats = all_of(format)});
      Problem same = apart;
      same.tensors[kGrad] = same.tensors[kParam];
      const Problem want = expected(same);
      Problem got = apart;
      {
        const BoundJob bound(got);
        Job job = bound.without_sums();
        job.operands[kGrad] = job.operands[kParam];
        run(setting.rule, {{.job = job}});
      }
      got.tensors[kGrad] = want.tensors[kGrad];  // not part of this job
      CHECK(difference(got, want) == "");
    }
}

// -- numbers in the GPU's memory -------------------------------------------------------------------------------------

// Where the numbers of a parameter are: in the table as values, or in memory in this format.
using Where = std::optional<Format>;
constexpr std::array<Where, 3> kEverywhere{std::nullopt, Format::float32, Format::float64};

double stored(double value, Where where) {
  return where == Format::float32 ? double{static_cast<float>(value)} : value;
}

// A problem whose constants are computed by the kernel `prepare`.
class Counted {
 public:
  Counted(Problem problem, Where step, Where scalars, std::array<Where, 2> hypers) : problem_(std::move(problem)) {
    Setting& setting = problem_.setting;
    const RuleInfo& info = info_of(setting.rule);
    // Numbers that are stored in float32 are rounded before the step.
    for (std::size_t h = 0; h < info.hyper_names.size(); ++h) hyper_[h] = place(setting.hyper[h], hypers[h % 2]);
    for (std::size_t s = 0; s < info.scalar_names.size(); ++s) numbers_[1 + s] = place(setting.scalars[s], scalars);
    double made = setting.step - 1.0;
    numbers_[0] = place(made, info.counts_steps ? step : std::nullopt);
    want_ = memory_;
    overwrite(numbers_[0], setting.step);
    std::array<double, kMaxScalars> after = setting.scalars;
    info.advance(setting.hyper.data(), setting.step, after.data());
    for (std::size_t s = 0; s < info.scalar_names.size(); ++s) overwrite(numbers_[1 + s], after[s]);
  }
  Counted(const Counted&) = delete;
  Counted& operator=(const Counted&) = delete;

  DeviceJob job() {
    DeviceJob job{.job = bound_.emplace(problem_).without_sums(), .hyper = &hyper_, .numbers = numbers_};
    job.job.constants = nullptr;
    return job;
  }
  Problem& problem() { return problem_; }
  const std::deque<std::uint64_t>& memory() const { return memory_; }
  const std::deque<std::uint64_t>& want() const { return want_; }

 private:
  Number place(double& value, Where where) {
    if (!where) return {.value = value};
    value = stored(value, where);
    std::uint64_t& slot = memory_.emplace_back(0xa5a5a5a5a5a5a5a5);
    write(slot, *where, value);
    return {.data = reinterpret_cast<std::byte*>(&slot), .format = *where};
  }

  static void write(std::uint64_t& slot, Format format, double value) {
    const auto rounded = static_cast<float>(value);
    if (format == Format::float32) {
      std::memcpy(&slot, &rounded, sizeof rounded);
    } else {
      std::memcpy(&slot, &value, sizeof value);
    }
  }

  void overwrite(const Number& number, double value) {
    for (std::size_t i = 0; i < memory_.size(); ++i)
      if (reinterpret_cast<std::byte*>(&memory_[i]) == number.data) write(want_[i], number.format, value);
  }

  Problem problem_;
  std::deque<std::uint64_t> memory_, want_;  // of the numbers: before the step, and the expected values after it
  std::array<Number, kMaxHyper> hyper_{};
  std::array<Number, 1 + kMaxScalars> numbers_{};
  std::optional<BoundJob> bound_;
};

TEST_CASE("constants and numbers after the step are those of the host") {
  for (const Setting& setting : kSettings)
    for (const bool wide : {false, true})
      for (unsigned where = 0; where < 3 * 3 * 3 * 3; ++where) {
        Counted counted(
            make_problem(setting, {37}, {.formats = all_of(native(wide)), .wide = wide, .grad_factor = -1.0}),
            kEverywhere[where % 3], kEverywhere[where / 3 % 3], {kEverywhere[where / 9 % 3], kEverywhere[where / 27]});
        const Problem want = expected(counted.problem());
        const std::vector<DeviceJob> jobs{counted.job()};
        Workspace workspace(cuda::workspace_size(setting.rule, jobs));
        run_step(backend(kShort), setting.rule, jobs, {}, workspace.data(), 0, nullptr);
        CAPTURE(setting.what);
        CHECK(difference(counted.problem(), want) == "");
        CHECK(counted.memory() == counted.want());
        const Constants constants(counted.problem().setting, wide);
        const std::size_t size = info_of(setting.rule).constants_size[wide ? 1 : 0];
        CHECK(std::memcmp(workspace.data(), constants.data(), size) == 0);
      }
}

// Tensors of all kinds, each with another step count.
std::deque<Counted> counted_model(const Setting& setting, std::int64_t tensors, double grad_factor = 1.0) {
  std::deque<Counted> model;
  for (std::int64_t i = 0; i < tensors; ++i) {
    Setting own = setting;
    if (info_of(setting.rule).counts_steps) own.step = 1.0 + static_cast<double>(i);
    const bool wide = i % 5 == 4;
    const auto at = static_cast<std::size_t>(i);
    model.emplace_back(
        make_problem(own, {i % 50}, {.formats = all_of(native(wide)), .wide = wide, .grad_factor = grad_factor}),
        kEverywhere[at % 3], kEverywhere[at / 3 % 3], std::array{kEverywhere[at / 9 % 3], kEverywhere[at / 27 % 3]});
  }
  return model;
}

std::vector<DeviceJob> jobs_of(std::deque<Counted>& model) {
  std::vector<DeviceJob> jobs;
  for (Counted& counted : model) jobs.push_back(counted.job());
  return jobs;
}

TEST_CASE("many tensors at different steps, more than a table has room for") {
  for (const char* name : {"adam, amsgrad, decoupled", "nadam", "asgd, averaging, decay", "sgd, first step", "radam"}) {
    std::deque<Counted> model = counted_model(setting_of(name), 1500);
    std::vector<Problem> want;
    for (Counted& counted : model) want.push_back(expected(counted.problem()));
    run(setting_of(name).rule, jobs_of(model));
    for (std::size_t i = 0; i < want.size(); ++i) {
      CAPTURE(i);
      CHECK(difference(model[i].problem(), want[i]) == "");
      CHECK(model[i].memory() == model[i].want());
    }
  }
}

TEST_CASE("constants from the host beside those made on the GPU, in one step") {
  const Setting& setting = setting_of("nadam, decoupled");
  std::deque<Counted> model = counted_model(setting, 40);
  std::vector<DeviceJob> jobs = jobs_of(model);
  std::deque<Constants> constants;
  std::vector<Problem> want;
  for (std::size_t i = 0; i < model.size(); ++i) {
    want.push_back(expected(model[i].problem()));
    if (i / 3 % 2 == 0) continue;
    jobs[i].hyper = nullptr;
    jobs[i].job.constants = constants.emplace_back(model[i].problem().setting, jobs[i].job.wide).data();
  }
  run(setting.rule, jobs);
  for (std::size_t i = 0; i < want.size(); ++i) CHECK(difference(model[i].problem(), want[i]) == "");
}

// -- GradScaler ------------------------------------------------------------------------------------------------------

const std::byte* bytes_of(const float& number) { return reinterpret_cast<const std::byte*>(&number); }

TEST_CASE("gradients are divided by the scale as on the host") {
  const Setting& setting = setting_of("adam, amsgrad, decoupled");
  for (const float scale : {65536.0F, 3.0F, 1e-3F, 1e30F})
    for (const double sign : {1.0, -1.0}) {
      std::deque<Counted> model = counted_model(setting, 20, sign);
      std::vector<Problem> want;
      for (Counted& counted : model) {
        Problem scaled = counted.problem();
        scaled.grad_factor = sign * (1.0 / double{scale});
        want.push_back(expected(std::move(scaled)));
      }
      const float none = 0.0F;
      run(setting.rule, jobs_of(model), kShort, {.grad_scale = bytes_of(scale), .found_inf = bytes_of(none)});
      for (std::size_t i = 0; i < want.size(); ++i) {
        CHECK(difference(model[i].problem(), want[i]) == "");
        CHECK(model[i].memory() == model[i].want());
      }
    }
}

TEST_CASE("a step with infinite gradients is skipped, and not counted") {
  const float scale = 65536.0F;
  for (const Setting& setting : kSettings)
    for (const float found : {1.0F, 2.0F}) {
      std::deque<Counted> model = counted_model(setting, 20);
      std::vector<DeviceJob> jobs = jobs_of(model);
      std::vector<Problem> want;
      std::vector<std::deque<std::uint64_t>> numbers;
      for (Counted& counted : model) {
        want.push_back(counted.problem());
        numbers.push_back(counted.memory());
      }
      Problem plain = make_problem(setting, {5000});
      want.push_back(plain);
      const BoundJob bound(plain);
      jobs.push_back({.job = bound.without_sums()});
      run(setting.rule, jobs, kShort, {.grad_scale = bytes_of(scale), .found_inf = bytes_of(found)});
      CHECK(difference(plain, want.back()) == "");
      for (std::size_t i = 0; i < model.size(); ++i) {
        CHECK(difference(model[i].problem(), want[i]) == "");
        CHECK(model[i].memory() == numbers[i]);
      }
    }
}

}  // namespace
}  // namespace onepass::testing
