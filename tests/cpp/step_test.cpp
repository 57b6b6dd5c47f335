// run_step: threads, the floating-point mode, read-only gradients and forked children.
#include "cpu/step.h"

#include <doctest/doctest.h>
#include <omp.h>

#include <algorithm>
#include <cstdint>
#include <deque>
#include <filesystem>
#include <iterator>
#include <string>
#include <string_view>
#include <thread>
#include <vector>

#include "cases.h"
#include "reference.h"
#include "with_sums.h"

#if defined(__SSE2__)
#include <xmmintrin.h>
#endif
#if defined(__unix__) || defined(__APPLE__)
#include <signal.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>
#define HAS_POSIX
#endif

namespace onepass::testing {
namespace {

// A step of these problems, ready to run.
class Step {
 public:
  explicit Step(std::vector<Problem>& problems) : rule_(problems.front().setting.rule) {
    for (Problem& problem : problems) jobs_.push_back(bound_.emplace_back(problem).job());
  }
  void run(int threads) const { run_step(rule_, jobs_, threads); }

 private:
  RuleId rule_;
  std::deque<BoundJob> bound_;
  std::vector<Job> jobs_;
};

void step(std::vector<Problem>& problems, int threads) { Step(problems).run(threads); }

void check(const std::vector<Problem>& got, const std::vector<Problem>& want) {
  for (std::size_t i = 0; i < want.size(); ++i) {
    CAPTURE(i);
    CHECK(difference(got[i], want[i]) == "");
  }
}

std::vector<Problem> expected(const std::vector<Problem>& problems) {
  std::vector<Problem> want;
  for (const Problem& problem : problems) want.push_back(testing::expected(problem));
  return want;
}

// Tensors of all kinds and sizes, including empty ones, and large enough together for five threads.
std::vector<Problem> model(const Setting& setting) {
  using enum Format;
  std::vector<Problem> problems;
  const auto add = [&](std::vector<std::int64_t> shape, Spec spec = {}) {
    problems.push_back(make_problem(setting, std::move(shape), spec));
  };
  add({0});
  add({1});
  add({400'000});
  add({0, 7});
  for (std::int64_t length = 1000; length < 1050; ++length) add({length}, {.misalignment = 4});
  add({100'003}, {.formats = {bfloat16, bfloat16, float32, float32, float32}});
  add({300, 401}, {.strides = {{{}, {1, 300}, {}}}});
  add({50'001}, {.formats = {float64, float64, float64, float64, float64}, .wide = true});
  for (std::int64_t length = 0; length < 500; ++length) add({length % 37});
  add({123'457}, {.formats = {float32, float16, bfloat16}, .grad_factor = -0.25});
  add({200'001}, {.followers = {Follower{0.3, true}}});
  add({150'001}, {.followers = {Follower{0.9, false}, Follower{0.3, true}}});
  add({600'000});
  add({0});
  return problems;
}

#if defined(__linux__)
// The first test here, when no other has started threads. Without it, the others might run on one thread and prove
// nothing.
TEST_CASE("the model is large enough for five threads") {
  std::vector<Problem> problems = model(setting_of("lion, decay"));
  step(problems, 5);
  const std::filesystem::directory_iterator tasks("/proc/self/task");
  CHECK(std::distance(begin(tasks), end(tasks)) >= 5);
}
#endif

TEST_CASE("every instruction set and number of threads gives the bits of the reference") {
  for (const char* setting : {"sgd, nesterov", "adam, amsgrad, decoupled", "lion, decay"}) {
    const std::vector<Problem> problems = model(setting_of(setting));
    const std::vector<Problem> want = expected(problems);
    for (const Isa& isa : supported_isas()) {
      CAPTURE(std::string_view(isa.name));
      force_isa(isa.name);
      for (const int threads : {1, 2, 3, 5}) {
        CAPTURE(threads);
        std::vector<Problem> got = problems;
        step(got, threads);
        check(got, want);
      }
    }
  }
  force_isa("");
}

TEST_CASE("no jobs, and only empty ones") {
  run_step(RuleId::sgd, {}, 5);
  std::vector<Problem> problems(10'000, make_problem(setting_of("adam, amsgrad, decoupled"), {0}));
  const std::vector<Problem> want = problems;
  step(problems, 5);
  check(problems, want);
}

TEST_CASE("steps of several threads at once") {
  const std::vector<Problem> problems = model(setting_of("lion, decay"));
  const std::vector<Problem> want = expected(problems);
  std::vector<std::vector<Problem>> got(3, problems);
  std::vector<std::thread> threads;
  for (auto& own : got) threads.emplace_back([&own] { step(own, 2); });
  for (std::thread& thread : threads) thread.join();
  for (const auto& own : got) check(own, want);
}

// -- the floating-point mode -----------------------------------------------------------------------------------------

#if defined(__SSE2__)
// Every rounding mode, with and without flushing, with exception flags raised.
constexpr std::uint32_t kModes[] = {0x1f80, 0x3f80, 0x5f80, 0x7f80, 0x9f80, 0x1fc0, 0xffc0, 0x1fbf};

// Steps the problems in every mode, and compares them with `want`.
void check_modes(const std::vector<Problem>& problems, const std::vector<Problem>& want) {
  const std::uint32_t before = _mm_getcsr();
  for (const std::uint32_t mode : kModes) {
    CAPTURE(mode);
    for (const int threads : {1, 5}) {
      CAPTURE(threads);
      std::vector<Problem> got = problems;
      const Step step(got);
      std::uint32_t after[5] = {};
#pragma omp parallel num_threads(5)
      _mm_setcsr(mode);
      step.run(threads);
#pragma omp parallel num_threads(5)
      after[omp_get_thread_num()] = _mm_getcsr();
      _mm_setcsr(before);
      check(got, want);
      for (const std::uint32_t each : after) CHECK(each == mode);
    }
  }
#pragma omp parallel num_threads(5)
  _mm_setcsr(before);
}

TEST_CASE("a step neither depends on the caller's floating-point mode nor changes it") {
  const std::vector<Problem> problems = model(setting_of("adam, amsgrad, decoupled"));
  check_modes(problems, expected(problems));
}

TEST_CASE("sums over a tensor, and the constants that depend on them, do not depend on the caller's mode") {
  for (const Setting& setting : settings_with_sums()) {
    CAPTURE(setting.what);
    const std::vector<Problem> problems{make_problem(setting, {50'003})};
    std::vector<Problem> want = problems;
    step(want, 1);
    check_modes(problems, want);
  }
}
#endif

#if defined(__SSE2__) || defined(__aarch64__)
struct Denormal {
  Format format;
  bool wide;
  double value;
  double want;
};

// Denormals of the arithmetic type are read and written as zero. Those of float16 are not denormal in float32.
const Denormal kDenormals[] = {
    {Format::float32, false, 0x1p-130, 0},          {Format::float32, false, 0x1p-126, 0x1p-126},
    {Format::float64, true, 0x1p-1040, 0},          {Format::float64, true, 0x1p-1022, 0x1p-1022},
    {Format::float32, true, 0x1p-130, 0},           {Format::float64, false, 0x1p-130, 0},
    {Format::bfloat16, false, 0x1p-130, 0},         {Format::float64, true, 0x1p-130, 0x1p-130},
    {Format::float16, false, 0x1p-24, 0x1p-24},     {Format::float16, true, 0x1p-24, 0x1p-24},
    {Format::float16, false, 0x1.8p-16, 0x1.8p-16}, {Format::bfloat16, false, 0x1p-126, 0x1p-126},
};

TEST_CASE("denormals are flushed in every thread") {
  // The change is zero. Without momentum, a step then writes the parameter as it was read.
  const Setting still = make_setting<Sgd>("sgd, lr = 0", {}, 2);
  const Setting halving = make_setting<Sgd>("sgd, momentum = 1/2", {.momentum = 0.5}, 2);
  // The tensors between them are large enough that each of three small ones is in another thread's share.
  Spec large{.wide = true};
  large.formats.fill(Format::float64);
  std::vector<Problem> problems(5, make_problem(still, {500'000}, large));
  for (const Isa& isa : supported_isas()) {
    force_isa(isa.name);
    CAPTURE(std::string_view(isa.name));
    for (const auto& [format, wide, value, want] : kDenormals) {
      CAPTURE(std::string_view(name_of(format)));
      CAPTURE(wide);
      CAPTURE(value);
      Spec spec{.wide = wide, .grad_factor = 0};
      spec.formats.fill(format);
      Problem before = make_problem(still, {1000}, spec);
      Problem after = before;
      for (std::int64_t i = 0; i < 1000; ++i) {
        store(before.tensors[kParam], i, value);
        store(after.tensors[kParam], i, want);
      }
      for (const std::size_t i : {0U, 2U, 4U}) problems[i] = before;
      step(problems, 3);
      for (const std::size_t i : {0U, 2U, 4U}) CHECK(difference(problems[i], after) == "");
    }
    // Half of the smallest normal number is denormal.
    std::vector<Problem> one(1, make_problem(halving, {1}, {.grad_factor = 0}));
    store(one[0].tensors[kFirstState], 0, 0x1p-126);
    step(one, 1);
    CHECK(load<double>(one[0].tensors[kFirstState], 0) == 0);
  }
  force_isa("");
}
#endif

// -- memory and processes --------------------------------------------------------------------------------------------

#if defined(HAS_POSIX)
// Writing even the same bits to a gradient would be a fault.
TEST_CASE("gradients in memory that cannot be written") {
  constexpr std::int64_t length = 20'000;
  for (const Isa& isa : supported_isas()) {
    force_isa(isa.name);
    for (const Setting& setting : kSettings) {
      for (const Format format : {Format::float32, Format::bfloat16}) {
        Spec spec;
        spec.formats.fill(format);
        Problem problem = make_problem(setting, {length}, spec);
        const Problem want = testing::expected(problem);
        Tensor& gradient = problem.tensors[kGrad];
        void* pages = mmap(nullptr, gradient.memory.size(), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        REQUIRE(pages != MAP_FAILED);
        std::memcpy(pages, gradient.memory.data(), gradient.memory.size());
        REQUIRE(mprotect(pages, gradient.memory.size(), PROT_READ) == 0);
        {
          const BoundJob bound(problem);
          Job job = bound.job();
          job.operands[kGrad].data = static_cast<std::byte*>(pages) + gradient.first;
          run_step(setting.rule, {&job, 1}, 2);
        }
        munmap(pages, gradient.memory.size());
        if (info_of(setting.rule).sums == 0) CHECK(difference(problem, want) == "");  // `expected` has no sums
      }
    }
  }
  force_isa("");
}

// A child has one thread. A parallel region would wait for its parent's threads without end.
TEST_CASE("a forked child steps after its parent has stepped with threads") {
  const std::vector<Problem> problems = model(setting_of("lion, decay"));
  const std::vector<Problem> want = expected(problems);
  std::vector<Problem> got = problems;
  step(got, 5);
  check(got, want);

  const pid_t child = fork();
  REQUIRE(child >= 0);
  if (child == 0) {
    std::vector<Problem> own = problems;
    step(own, 5);
    bool same = true;
    for (std::size_t i = 0; i < own.size(); ++i) same = same && difference(own[i], want[i]).empty();
    _exit(same ? 0 : 1);
  }
  int status = -1;
  pid_t ended = 0;
  for (int tries = 0; tries < 2000 && ended == 0; ++tries) {
    ended = waitpid(child, &status, WNOHANG);
    if (ended == 0) usleep(10'000);
  }
  if (ended == 0) {
    kill(child, SIGKILL);
    waitpid(child, &status, 0);
  }
  CHECK(ended == child);
  CHECK((WIFEXITED(status) && WEXITSTATUS(status) == 0));

  got = problems;
  step(got, 5);
  check(got, want);
}
#endif

}  // namespace
}  // namespace onepass::testing
