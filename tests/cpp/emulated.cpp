// The CUDA kernels on the CPU: the lines that run on a GPU, one thread after the other, behind the same table of
// functions. A separate library, so that pytest can load it, too.
#include <algorithm>

#include "cpu/fpmode.h"
#include "cuda/backend.h"
#include "cuda/kernel.h"
#include "cuda/norm_kernel.h"
#include "cuda/stochastic_kernel.h"
#include "cuda/sum_kernel.h"
#include "rules/all.h"

namespace onepass::inline ONEPASS_TARGET {
namespace {

using cuda::Decision;
using cuda::LargeTable;
using cuda::Work;

// Returns the measure of a block.
template <class MeasureOfThread>
double combine_block(Measure what, MeasureOfThread&& measure) {
  double measures[cuda::kThreads];
  for (std::uint32_t thread = 0; thread < cuda::kThreads; ++thread) measures[thread] = measure(thread);
  for (std::uint32_t distance = cuda::kThreads / 2; distance > 0; distance /= 2)
    for (std::uint32_t thread = 0; thread < cuda::kThreads; ++thread) combine_pair(what, measures, thread, distance);
  return measures[0];
}

// Returns the sums of all threads of a block.
template <class Rule, class SumsOfThread>
Sums<Rule> sums_of_block(SumsOfThread&& sums_of) {
  Sums<Rule> of_threads[cuda::kThreads];
  for (std::uint32_t thread = 0; thread < cuda::kThreads; ++thread) of_threads[thread] = sums_of(thread);
  Sums<Rule> totals;
  for (std::size_t k = 0; k < Rule::sums; ++k)
    totals.values[k] =
        combine_block(Measure::sum_of_squares, [&](std::uint32_t thread) { return of_threads[thread].values[k]; });
  return totals;
}

template <class Rule, class T>
void run_sums(Work work, const LargeTable& table) {
  for (std::uint32_t block = 0; block < blocks_of(work, table); ++block)
    if (work == Work::sum) {
      write_sums(table, block,
                 sums_of_block<Rule>([&](std::uint32_t thread) { return sum_chunk<Rule, T>(table, block, thread); }));
    } else {
      const auto sums = sums_of_block<Rule>([&](std::uint32_t thread) {
        Sums<Rule> own;
        for (std::size_t k = 0; k < Rule::sums; ++k) own.values[k] = add_blocks<Rule>(table, block, k, thread);
        return own;
      });
      if (work == Work::total) {
        write_totals(table, block, sums);
      } else {
        complete_row<Rule, T>(table, block, sums);
      }
    }
}

template <class Rule, class T>
void run(Work work, const LargeTable& table) {
  if (work == Work::sum || work == Work::total || work == Work::complete) {
    if constexpr (requires { Rule::sums; }) run_sums<Rule, T>(work, table);
    return;
  }
  for (std::uint32_t block = 0; block < blocks_of(work, table); ++block)
    for (std::uint32_t thread = 0; thread < cuda::kThreads; ++thread)
      if (work == Work::step) {
        step_chunk<Rule, T>(table, block, thread);
      } else if (work == Work::step_stochastic) {
        if constexpr (sizeof(T) == sizeof(float)) step_stochastic_chunk<Rule>(table, block, thread);
      } else {
        prepare_row<Rule, T>(table, block * cuda::kThreads + thread);
      }
}

constexpr void (*kNarrow[])(Work, const LargeTable&) = {
#define ONEPASS_X(name, Type) &run<Type, float>,
    ONEPASS_RULES(ONEPASS_X)
#undef ONEPASS_X
};
constexpr void (*kWide[])(Work, const LargeTable&) = {
#define ONEPASS_X(name, Type) &run<Type, double>,
    ONEPASS_RULES(ONEPASS_X)
#undef ONEPASS_X
};

template <Measure what, class T>
void run_measures(Work work, const LargeTable& table) {
  for (std::uint32_t block = 0; block < blocks_of(work, table); ++block)
    at_address<double>(table.header.workspace)[block] =
        combine_block(what, [&](std::uint32_t thread) { return measure_chunk<what, T>(table, block, thread); });
}

const char* decide_now(const Decision& decision, void*) {
  const StepMode mode;
  decide(decision,
         combine_block(decision.what, [&](std::uint32_t thread) { return combine_measures(decision, thread); }));
  return nullptr;
}

const char* launch(Work work, RuleId rule, bool wide, const LargeTable& table, void*) {
  // A kernel gets a copy of the part of the table that is in use, and nothing else.
  static thread_local LargeTable argument;
  std::ranges::fill(argument.words, 0xabababababababab);
  argument.header = table.header;
  std::copy_n(table.words, table.header.words, argument.words);
  const StepMode mode;
  if (work == Work::sum_of_squares) {
    constexpr Measure what = Measure::sum_of_squares;
    wide ? run_measures<what, double>(work, argument) : run_measures<what, float>(work, argument);
  } else if (work == Work::largest_magnitude) {
    constexpr Measure what = Measure::largest_magnitude;
    wide ? run_measures<what, double>(work, argument) : run_measures<what, float>(work, argument);
  } else {
    (wide ? kWide : kNarrow)[static_cast<int>(rule)](work, argument);
  }
  return nullptr;
}

constexpr cuda::Backend kBackend{
    .fingerprint = cuda::fingerprint(),
    .built = "an imitation on the CPU",
    .unusable = []() -> const char* { return nullptr; },
    .multiprocessors = [](int) { return 1; },
    .launch = &launch,
    .decide = &decide_now,
};

}  // namespace
}  // namespace onepass::inline ONEPASS_TARGET

extern "C" [[gnu::visibility("default")]] const onepass::cuda::Backend* onepass_emulated_backend() {
  return &onepass::kBackend;
}
