// The CUDA kernels on the CPU: the lines that run on a GPU, one thread after the other, behind the same table of
// functions. A separate library, so that pytest can load it, too.
#include <algorithm>

#include "cpu/fpmode.h"
#include "cuda/backend.h"
#include "cuda/kernel.h"
#include "rules/all.h"

namespace onepass::inline ONEPASS_TARGET {
namespace {

using cuda::LargeTable;
using cuda::Work;

template <class Rule, class T>
void run(Work work, const LargeTable& table) {
  const std::uint32_t blocks =
      work == Work::step ? table.header.blocks : (table.header.rows + cuda::kThreads - 1) / cuda::kThreads;
  for (std::uint32_t block = 0; block < blocks; ++block)
    for (std::uint32_t thread = 0; thread < cuda::kThreads; ++thread)
      if (work == Work::step) {
        step_chunk<Rule, T>(table, block, thread);
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

const char* launch(Work work, RuleId rule, bool wide, const LargeTable& table, void*) {
  // A kernel gets a copy of the part of the table that is in use, and nothing else.
  static thread_local LargeTable argument;
  std::ranges::fill(argument.words, 0xabababababababab);
  argument.header = table.header;
  std::copy_n(table.words, table.header.words, argument.words);
  const StepMode mode;
  (wide ? kWide : kNarrow)[static_cast<int>(rule)](work, argument);
  return nullptr;
}

constexpr cuda::Backend kBackend{
    .built = "an imitation on the CPU",
    .unusable = []() -> const char* { return nullptr; },
    .multiprocessors = [](int) { return 1; },
    .launch = &launch,
};

}  // namespace
}  // namespace onepass::inline ONEPASS_TARGET

extern "C" [[gnu::visibility("default")]] const onepass::cuda::Backend* onepass_emulated_backend() {
  return &onepass::kBackend;
}
