// The kernels without Python, one tensor for each step: built with -DONEPASS_BENCH=ON, and run by bench/kernels.py.
//
//   RULE/FORMATS/ISA/ELEMENTS[/threads:N]                every rule of the registry, in one typical setting
//   traffic/float32/LOOP/ELEMENTS/updated:N[/threads:N]  additions only: one array is added to N others
//
// Beside Google Benchmark's flags there is --memory_elements=N: the number of elements of benchmarks that are limited
// by memory.
//
// Every kernel is checked before it is timed. An operand's elements repeat a short pattern, so the step of the pattern
// by its definition (tests/cpp/reference.h) gives the expected bytes of every operand after the first step. That step
// runs as the timed ones do: with the same instruction set and threads, over all elements.
//
// bytes_per_second counts each operand once for every time that it must move: the gradient is read; the parameter and
// the states that the step uses are read and written. It does not account for caches. A store does not fetch more,
// because everything that is written is also read. Times are wall-clock times. Debian's Google Benchmark warns that it
// "was built as DEBUG". This affects the time before and after the timed iterations, not the iterations.
#include <benchmark/benchmark.h>
#include <omp.h>

#include <algorithm>
#include <array>
#include <charconv>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <deque>
#include <exception>
#include <functional>
#include <map>
#include <memory>
#include <span>
#include <stdexcept>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>
#include <vector>

#include "cases.h"
#include "cpu/dispatch.h"
#include "cpu/step.h"
#include "reference.h"
#include "traffic/traffic.h"

namespace onepass::testing {
namespace {

constexpr std::int64_t kInCache = 4096;  // elements: 64 KiB in the four float32 arrays of Adam
constexpr std::int64_t kInMemory = std::int64_t{32} << 20;
constexpr std::int64_t kPattern = 1021;  // elements; prime, so that it does not align with tiles and threads
constexpr int kMostUpdated = 4;          // arrays of a rule

using Bytes = std::span<const std::byte>;
Bytes bytes_of(std::span<const float> values) { return std::as_bytes(values); }

bool failed = false;  // whether a check has failed

// -- memory ----------------------------------------------------------------------------------------------------------

// Returns memory for this many elements of operand k, of any format. It is kept, because getting it from the system
// takes longer than a step. Each number of elements has its own memory, so that small arrays are placed as malloc
// places them.
std::byte* room(std::int64_t elements, std::size_t k) {
  static std::map<std::int64_t, std::array<Memory, kMaxOperands>> rooms;
  Memory& memory = rooms[elements][k];
  if (memory.size() == 0) memory = Memory(static_cast<std::size_t>(elements) * size_of(Format::float64));
  return memory.data();
}

// Calls visit(byte, pattern) for each repetition of a pattern in this many bytes; the last pattern may be cut.
template <class Visit>
void for_each_repetition(Bytes pattern, std::size_t size, Visit&& visit) {
  for (std::size_t at = 0; at < size; at += pattern.size())
    visit(at, pattern.first(std::min(pattern.size(), size - at)));
}

void fill(std::byte* data, Bytes pattern, std::size_t size) {
  for_each_repetition(pattern, size, [&](std::size_t at, Bytes part) { std::ranges::copy(part, data + at); });
}

bool is_filled(const std::byte* data, Bytes pattern, std::size_t size) {
  bool same = true;
  for_each_repetition(pattern, size, [&](std::size_t at, Bytes part) {
    same = same && std::memcmp(data + at, part.data(), part.size()) == 0;
  });
  return same;
}

// -- what is measured ------------------------------------------------------------------------------------------------

// A step that is ready to be repeated.
class Subject {
 public:
  virtual ~Subject() = default;
  // Fills the arrays, makes the first step, and returns what is wrong with its result; empty if it is correct.
  virtual std::string begin() = 0;
  virtual void step() = 0;

  std::int64_t elements = 0;
  std::int64_t bytes = 0;  // for each element
  int updated = 0;         // arrays that are read and written
};

struct Formats {
  const char* name;
  Format param_and_grad;
  Format states;
};

constexpr Formats kFormats[] = {
    {"float32", Format::float32, Format::float32},    {"bfloat16_float32_states", Format::bfloat16, Format::float32},
    {"bfloat16", Format::bfloat16, Format::bfloat16}, {"float16", Format::float16, Format::float16},
    {"float64", Format::float64, Format::float64},
};

Problem make_pattern(const Setting& setting, const Formats& formats) {
  Spec spec{.wide = formats.param_and_grad == Format::float64};
  spec.formats.fill(formats.states);
  spec.formats[kParam] = spec.formats[kGrad] = formats.param_and_grad;
  return make_problem(setting, {kPattern}, spec);
}

class RuleStep : public Subject {
 public:
  RuleStep(const Setting& setting, const Formats& formats, const char* isa, std::int64_t length, int threads)
      : pattern_(make_pattern(setting, formats)), bound_(pattern_), job_(bound_.job()), isa_(isa), threads_(threads) {
    elements = job_.length = length;
    bytes = 2 * job_.bytes_per_element() - static_cast<std::int64_t>(size_of(formats.param_and_grad));
    for (std::size_t k = 0; k < pattern_.tensors.size(); ++k) updated += k != kGrad && uses(pattern_, k) ? 1 : 0;
  }

  std::string begin() override {
    force_isa(isa_);
    for_each_operand(pattern_, [&](std::size_t k, Bytes pattern, std::size_t size) {
      job_.operands[k].data = room(elements, k);
      fill(job_.operands[k].data, pattern, size);
    });
    job_.grad_factor = 1.0;
    run_step(pattern_.setting.rule, {&job_, 1}, threads_);

    std::string wrong;
    Problem want = expected(pattern_);
    for_each_operand(want, [&](std::size_t k, Bytes pattern, std::size_t size) {
      if (!is_filled(job_.operands[k].data, pattern, size))
        wrong += (wrong.empty() ? "not the bits of the reference: operand " : ", ") + std::to_string(k);
    });
    return wrong;
  }

  // The gradient changes its sign at each step, so that the parameter does not leave the range of its format.
  void step() override {
    job_.grad_factor = -job_.grad_factor;
    run_step(pattern_.setting.rule, {&job_, 1}, threads_);
  }

 private:
  template <class Visit>
  void for_each_operand(Problem& problem, Visit&& visit) const {
    for (std::size_t k = 0; k < problem.tensors.size(); ++k) {
      if (!uses(problem, k)) continue;
      const std::size_t size = size_of(problem.tensors[k].format);
      visit(k, Bytes(problem.tensors[k].at(0), kPattern * size), static_cast<std::size_t>(elements) * size);
    }
  }

  Problem pattern_;
  BoundJob bound_;
  Job job_;
  const char* isa_;
  int threads_;
};

class TrafficStep : public Subject {
 public:
  TrafficStep(const Loop& loop, int arrays, std::int64_t length, int threads) : loop_(loop), threads_(threads) {
    elements = length;
    updated = arrays;
    bytes = (1 + 2 * arrays) * static_cast<std::int64_t>(sizeof(float));
  }

  std::string begin() override {
    const auto count = static_cast<std::size_t>(updated);
    const auto size = static_cast<std::size_t>(elements) * sizeof(float);
    // Array 0 is the one that is read. All values and their sums are exact.
    const auto pattern = [](std::size_t k, int steps) {
      std::vector<float> values;
      for (std::int64_t i = 0; i < kPattern; ++i)
        values.push_back(static_cast<float>(k) + static_cast<float>(steps) * static_cast<float>(i + 1));
      return values;
    };
    traffic_ = {.length = elements, .read = reinterpret_cast<float*>(room(elements, 0)), .updated = {}, .measured = {}};
    fill(room(elements, 0), bytes_of(pattern(0, 1)), size);
    for (std::size_t k = 1; k <= count; ++k) {
      fill(room(elements, k), bytes_of(pattern(k, 0)), size);
      traffic_.updated.push_back(reinterpret_cast<float*>(room(elements, k)));
    }
    step();
    for (std::size_t k = 1; k <= count; ++k)
      if (!is_filled(room(elements, k), bytes_of(pattern(k, 1)), size)) return "wrong sums";
    return "";
  }

  void step() override { move_traffic(loop_, {&traffic_, 1}, threads_); }

 private:
  const Loop& loop_;
  Traffic traffic_;
  int threads_;
};

// -- Google Benchmark ------------------------------------------------------------------------------------------------

using MakeSubject = std::function<std::unique_ptr<Subject>()>;

// Google Benchmark calls this several times in a row for one result, with growing numbers of iterations. The first call
// fills the arrays and checks the first step.
void measure(benchmark::State& state, const MakeSubject& make) {
  static const MakeSubject* current = nullptr;
  static std::unique_ptr<Subject> subject;
  if (current != &make) {
    subject = make();
    current = &make;
    if (const std::string wrong = subject->begin(); !wrong.empty()) {
      failed = true;
      current = nullptr;
      state.SkipWithError(wrong.c_str());
      return;
    }
  }
  for (auto _ : state) subject->step();
  const auto elements = static_cast<double>(state.iterations()) * static_cast<double>(subject->elements);
  state.SetBytesProcessed(state.iterations() * subject->elements * subject->bytes);
  using benchmark::Counter;
  state.counters["time_per_element"] = Counter(elements, Counter::kIsRate | Counter::kInvert);
  state.counters["updated"] = subject->updated;
}

// Wall-clock time, because the processor time of the calling thread does not include the other threads.
void add(const std::string& name, int threads, MakeSubject make) {
  static std::deque<MakeSubject> makes;  // a deque, because addresses of its elements do not change
  const MakeSubject& kept = makes.emplace_back(std::move(make));
  benchmark::RegisterBenchmark((name + (threads > 1 ? "/threads:" + std::to_string(threads) : "")).c_str(),
                               [&kept](benchmark::State& state) { measure(state, kept); })
      ->UseRealTime();
}

// Returns the setting with the rule's name; if there is none (SGD), the last setting of the rule.
const Setting& typical_setting(RuleId rule) {
  const Setting* found = nullptr;
  for (const Setting& setting : kSettings) {
    if (setting.rule != rule) continue;
    found = &setting;
    if (setting.what == info_of(rule).name) break;
  }
  if (found == nullptr)
    throw std::logic_error(std::string("tests/cpp/cases.h has no setting of ") + info_of(rule).name);
  return *found;
}

struct Extent {
  std::int64_t elements;
  int threads;
};

void add_rule(RuleId rule, std::span<const Extent> extents) {
  const Setting& setting = typical_setting(rule);
  for (const Formats& formats : kFormats) {
    if (states_used(setting) == 0 && formats.states != formats.param_and_grad) continue;
    for (const Isa& isa : supported_isas())
      for (const auto& [elements, threads] : extents)
        add(std::string(info_of(rule).name) + "/" + formats.name + "/" + isa.name + "/" + std::to_string(elements),
            threads, [&setting, &formats, isa = isa.name, elements = elements, threads = threads] {
              return std::make_unique<RuleStep>(setting, formats, isa, elements, threads);
            });
  }
}

void add_traffic(std::span<const Extent> extents) {
  for (const Loop& loop : loops())
    for (int updated = 1; updated <= kMostUpdated; ++updated)
      for (const auto& [elements, threads] : extents)
        add("traffic/float32/" + std::string(loop.name) + "/" + std::to_string(elements) +
                "/updated:" + std::to_string(updated),
            threads, [&loop, updated, elements = elements, threads = threads] {
              return std::make_unique<TrafficStep>(loop, updated, elements, threads);
            });
}

// Returns the value of --memory_elements, and removes it from the arguments.
std::int64_t take_memory_elements(int& argc, char** argv) {
  static constexpr std::string_view flag = "--memory_elements=";
  std::int64_t elements = kInMemory;
  const auto taken = [&](const char* argument) {
    const std::string_view text = argument;
    if (!text.starts_with(flag)) return false;
    const auto [end, error] = std::from_chars(text.data() + flag.size(), text.data() + text.size(), elements);
    if (error != std::errc() || end != text.data() + text.size() || elements <= kInCache)
      throw std::invalid_argument(std::string(flag) + "N: N is a number above " + std::to_string(kInCache));
    return true;
  };
  argc = static_cast<int>(std::remove_if(argv + 1, argv + argc, taken) - argv);
  return elements;
}

int main_of(int argc, char** argv) {
  const std::int64_t memory = take_memory_elements(argc, argv);
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 2;

  const Extent extents[] = {{memory, 1}, {memory, omp_get_max_threads()}, {kInCache, 1}};
  const std::span all(extents);
  const auto in_memory = all.first(extents[1].threads > 1 ? 2 : 1);
  add_traffic(in_memory);
  for (int rule = 0; rule < kRules; ++rule) {
    add_rule(static_cast<RuleId>(rule), all.last(1));
    add_rule(static_cast<RuleId>(rule), in_memory);
  }
  const std::size_t run = benchmark::RunSpecifiedBenchmarks();
  return failed || run == 0 ? 1 : 0;
}

}  // namespace
}  // namespace onepass::testing

int main(int argc, char** argv) {
  try {
    return onepass::testing::main_of(argc, argv);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "kernels_bench: %s\n", error.what());
    return 2;
  }
}
