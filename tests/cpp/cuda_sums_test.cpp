// Rules whose update depends on sums over the whole tensor, in the CUDA kernels, imitated on the CPU, against sums in
// long double.
#include <doctest/doctest.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <stdexcept>
#include <utility>
#include <vector>

#include "cuda/step.h"
#include "with_sums.h"

extern "C" const onepass::cuda::Backend* onepass_emulated_backend();

namespace onepass::testing {
namespace {

using cuda::DeviceJob;
using cuda::Number;
using enum Format;

// A problem with the rule's scalars in the GPU's memory, and with the step count there or in the table.
class Summed {
 public:
  explicit Summed(Problem& problem, bool counts_there = false) : problem_(problem), bound_(problem) {
    const Setting& setting = problem.setting;
    const RuleInfo& info = info_of(setting.rule);
    for (std::size_t h = 0; h < info.hyper_names.size(); ++h) hyper_[h].value = setting.hyper[h];
    numbers_[0] = {.value = setting.step - 1.0};
    step_ = setting.step - 1.0;
    if (counts_there) numbers_[0] = place(step_);
    for (std::size_t s = 0; s < info.scalar_names.size(); ++s) {
      scalars_[s] = setting.scalars[s];
      numbers_[1 + s] = place(scalars_[s]);
    }
  }
  Summed(const Summed&) = delete;
  Summed& operator=(const Summed&) = delete;

  DeviceJob job() const {
    DeviceJob job{.job = bound_.job(), .hyper = &hyper_, .numbers = numbers_};
    job.job.constants = nullptr;
    job.job.scalars = nullptr;
    return job;
  }

  // Gives the problem the scalars after the step.
  void fetch() {
    for (std::size_t s = 0; s < info_of(problem_.setting.rule).scalar_names.size(); ++s)
      problem_.setting.scalars[s] = scalars_[s];
  }
  double step() const { return step_; }

 private:
  static Number place(const double& value) {
    return {.data = reinterpret_cast<const std::byte*>(&value), .format = float64};
  }

  Problem& problem_;
  BoundJob bound_;
  double step_ = 0.0;
  std::array<double, kMaxScalars> scalars_{};
  std::array<Number, kMaxHyper> hyper_{};
  std::array<Number, 1 + kMaxScalars> numbers_{};
};

constexpr double kUnwritten = -77.0;

// Steps these problems, all of one rule, at once, in the shortest chunks.
void step(std::vector<Problem>& problems, bool counts_there = false, const cuda::Inputs& inputs = {}) {
  cuda::Backend backend = *onepass_emulated_backend();
  backend.multiprocessors = [](int) { return 1 << 30; };
  const RuleId rule = problems.front().setting.rule;
  std::deque<Summed> all;
  std::vector<DeviceJob> jobs;
  for (Problem& problem : problems) jobs.push_back(all.emplace_back(problem, counts_there).job());
  std::vector<double> workspace(cuda::workspace_size(rule, jobs) / sizeof(double) + 1, kUnwritten);
  cuda::run_step(backend, rule, jobs, inputs, reinterpret_cast<std::byte*>(workspace.data()), 0, nullptr);
  CHECK(workspace.back() == kUnwritten);
  for (Summed& summed : all) summed.fetch();
  const bool skipped = inputs.found_inf != nullptr;
  if (counts_there)
    for (std::size_t i = 0; i < all.size(); ++i)
      CHECK(all[i].step() == problems[i].setting.step - (skipped ? 1.0 : 0.0));
}

// Returns the problem after the step. On the CPU, the bindings advance scalars that do not depend on sums; here, the
// kernels do.
Problem expected_after(const Problem& problem) {
  Problem want = expected_with_sums(problem);
  const Setting& setting = problem.setting;
  info_of(setting.rule).advance(setting.hyper.data(), setting.step, want.setting.scalars.data());
  return want;
}

void check(const std::vector<Problem>& problems, bool counts_there = false) {
  std::vector<Problem> got = problems;
  step(got, counts_there);
  for (std::size_t i = 0; i < problems.size(); ++i) {
    CAPTURE(i);
    check_near(got[i], expected_after(problems[i]));
  }
}

TEST_CASE("every setting, format and alignment, at the lengths where vectors, blocks and chunks end") {
  for (const Setting& setting : settings_with_sums()) {
    CAPTURE(setting.what);
    for (const bool wide : {false, true}) {
      std::vector<Problem> problems;
      for (const Format format : {float32, float64, bfloat16, float16})
        for (const std::size_t ahead : {0U, 1U})
          for (const std::int64_t length : {0, 1, 5, 255, 1025, 4097, 20'001}) {
            if (length > 5000 && format != native(wide)) continue;
            Spec spec{.formats = all_of(format), .wide = wide, .grad_factor = -0.5};
            spec.ahead[kGrad] = ahead;
            problems.push_back(make_problem(setting, {length}, spec));
          }
      check(problems, wide);
    }
  }
}

TEST_CASE("layouts, mixed formats, clamped and zeroed gradients, masters and followers") {
  for (const Setting& setting : settings_with_sums()) {
    CAPTURE(setting.what);
    std::vector<Problem> problems;
    for (const View& view : kViews) problems.push_back(make_problem(setting, view.shape, {.strides = view.strides}));
    problems.push_back(make_problem(setting, {5'003}, {.formats = {bfloat16, float16, float32, float32}}));
    problems.push_back(make_problem(setting, {9'000}, {.grad_factor = 0.5, .misalignment = 4, .clip_value = 0.125}));
    for (const std::int64_t length : {2'000, 9'001}) {
      problems.push_back(make_problem(setting, {length},
                                      {.formats = {bfloat16, bfloat16, float32, float32}, .master = Master::low_bits}));
      problems.push_back(
          make_problem(setting, {length}, {.formats = {float16, float16, float32, float32}, .master = Master::whole}));
    }
    problems.push_back(make_problem(
        setting, {70, 60},
        {.formats = {bfloat16, bfloat16, float32, float32}, .strides = {{{1, 70}, {}, {}}}, .master = Master::whole}));
    for (const Followers& followers : kFollowers)
      problems.push_back(make_problem(setting, {9'002}, {.zeroes_grad = true, .followers = followers}));
    check(problems);
  }
}

TEST_CASE("the same bits for every alignment and layout") {
  for (const Setting& setting : settings_with_sums()) {
    CAPTURE(setting.what);
    for (const bool wide : {false, true}) {
      const Spec packed{.formats = all_of(native(wide)), .wide = wide};
      std::vector<Problem> problems{make_problem(setting, {9'001}, packed)};
      for (const std::size_t ahead : {1U, 2U, 3U}) {
        Spec spec = packed;
        spec.ahead[kGrad] = ahead;
        spec.ahead[kFirstState] = 4 - ahead;
        problems.push_back(make_problem(setting, {9'001}, spec));
      }
      Spec spread = packed;
      spread.strides = {{{}, {2}, {}}};
      problems.push_back(make_problem(setting, {9'001}, spread));
      // Elements of the same values at the same places, which make_problem draws by the position in memory.
      for (std::int64_t i = 0; i < 9'001; ++i)
        store(problems.back().tensors[kGrad], 2 * i, load<double>(problems.front().tensors[kGrad], i));
      step(problems);
      for (Problem& problem : problems) {
        std::int64_t wrong = 0;
        for (std::int64_t i = 0; i < 9'001; ++i)
          wrong +=
              load<double>(problem.tensors[kParam], i) == load<double>(problems.front().tensors[kParam], i) ? 0 : 1;
        CHECK(wrong == 0);
        CHECK(problem.setting.scalars == problems.front().setting.scalars);
      }
    }
  }
}

TEST_CASE("many tensors, more than a table has room for, with and without sums") {
  for (const Setting& setting : settings_with_sums()) {
    CAPTURE(setting.what);
    std::vector<Problem> problems;
    for (std::int64_t i = 0; i < 1200; ++i) {
      const bool wide = i % 7 == 0;
      problems.push_back(
          make_problem(setting, {i * 37 % 113 * (i % 50 == 0 ? 100 : 1)},
                       {.formats = all_of(native(wide)), .wide = wide, .grad_factor = static_cast<double>(i % 3 - 1)}));
    }
    check(problems);
  }
}

// Returns the elements of a job, whose operands are packed, from `begin` on, as a shard of the whole.
DeviceJob shard_of(DeviceJob job, std::int64_t begin, std::int64_t length) {
  for (Operand& operand : job.job.operands)
    if (operand.data != nullptr) operand.data += begin * static_cast<std::int64_t>(size_of(operand.format));
  job.job.whole = std::exchange(job.job.length, length);
  return job;
}

TEST_CASE("shards have the sums of the tensor that they are together, beside whole tensors") {
  for (const Setting& setting : settings_with_sums()) {
    CAPTURE(setting.what);
    const std::size_t sums = info_of(setting.rule).sums;
    std::vector<Problem> problems;
    for (const bool wide : {true, false})
      for (const std::int64_t length : {5'003, 700})
        problems.push_back(make_problem(setting, {length}, {.formats = all_of(native(wide)), .wide = wide}));
    std::vector<Problem> got = problems;
    std::deque<Summed> all;
    std::vector<DeviceJob> jobs;
    for (std::size_t i = 0; i < got.size(); ++i) {
      const auto next_job = [&] { return all.emplace_back(got[i]).job(); };  // with scalars of its own
      if (i % 2 != 0) {
        jobs.push_back(next_job());
        continue;
      }
      jobs.push_back(shard_of(next_job(), 0, 4'099));
      jobs.push_back(shard_of(next_job(), 4'099, 904));
      jobs.push_back(shard_of(next_job(), 5'003, 0));
    }
    cuda::Backend backend = *onepass_emulated_backend();
    backend.multiprocessors = [](int) { return 1 << 30; };
    CHECK(cuda::totals_size(setting.rule, jobs) == 6 * sums * sizeof(double));
    std::vector<double> workspace(cuda::workspace_size(setting.rule, jobs) / sizeof(double) + 1, kUnwritten);
    int calls = 0;
    const auto add_up = [&] {
      ++calls;
      for (std::size_t tensor = 0; tensor < 2; ++tensor)
        for (std::size_t k = 0; k < sums; ++k) {
          double* const own = workspace.data() + tensor * 3 * sums + k;
          own[0] = own[sums] = own[2 * sums] = own[0] + own[sums] + own[2 * sums];
        }
    };
    cuda::run_step(backend, setting.rule, jobs, {}, reinterpret_cast<std::byte*>(workspace.data()), 0, nullptr, add_up);
    CHECK(calls == 1);
    CHECK(workspace.back() == kUnwritten);
    for (Summed& summed : all) summed.fetch();
    for (std::size_t i = 0; i < got.size(); ++i) check_near(got[i], expected_after(problems[i]));
  }
}

TEST_CASE("nothing is counted or written if sums over shards cannot be added up") {
  for (const Setting& setting : settings_with_sums()) {
    CAPTURE(setting.what);
    const Problem before = make_problem(setting, {5'003});
    Problem problem = before;
    std::deque<Summed> all;
    Summed& summed = all.emplace_back(problem, true);
    const std::vector<DeviceJob> jobs{shard_of(summed.job(), 0, 4'099)};
    std::vector<double> workspace(cuda::workspace_size(setting.rule, jobs) / sizeof(double) + 1, kUnwritten);
    CHECK_THROWS_AS(cuda::run_step(*onepass_emulated_backend(), setting.rule, jobs, {},
                                   reinterpret_cast<std::byte*>(workspace.data()), 0, nullptr,
                                   [] { throw std::runtime_error("no connection"); }),
                    std::runtime_error);
    CHECK(summed.step() == setting.step - 1.0);
    summed.fetch();
    CHECK(problem.setting.scalars == before.setting.scalars);
    CHECK(difference(problem, before) == "");
  }
}

TEST_CASE("gradients are divided by the scale and multiplied by the coefficient before they are summed") {
  const float scale = 1024.0F;
  const cuda::DeviceClipping clipping{.norm = 3.0, .coefficient = 0.25, .skips = 0.0};
  for (const Setting& setting : settings_with_sums()) {
    std::vector<Problem> got{make_problem(setting, {9'000})};
    Problem scaled = got.front();
    scaled.grad_factor = 0.25 / 1024.0;
    step(got, false,
         {.grad_scale = reinterpret_cast<const std::byte*>(&scale),
          .found_inf = nullptr,
          .clipping = reinterpret_cast<const std::byte*>(&clipping)});
    check_near(got.front(), expected_after(scaled));
  }
}

TEST_CASE("a step with infinite gradients is skipped, and changes no scalar") {
  const float scale = 1024.0F, found = 1.0F;
  for (const Setting& setting : settings_with_sums()) {
    std::vector<Problem> got{make_problem(setting, {9'000}), make_problem(setting, {3})};
    const std::vector<Problem> before = got;
    step(got, true,
         {.grad_scale = reinterpret_cast<const std::byte*>(&scale),
          .found_inf = reinterpret_cast<const std::byte*>(&found)});
    for (std::size_t i = 0; i < got.size(); ++i) {
      CHECK(difference(got[i], before[i]) == "");
      CHECK(got[i].setting.scalars == before[i].setting.scalars);
    }
  }
}

}  // namespace
}  // namespace onepass::testing
