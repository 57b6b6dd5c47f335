#include "rules/table.h"

#include <cstring>
#include <new>

#include "rules/adam.h"
#include "rules/lion.h"
#include "rules/sgd.h"

namespace onepass {
namespace {

template <class Rule>
typename Rule::Hyper unpack(const double* hyper) {
  static_assert(sizeof(typename Rule::Hyper) == Rule::hyper_names.size() * sizeof(double));
  static_assert(Rule::hyper_names.size() <= kMaxHyper && Rule::state_names.size() <= kMaxStates);
  typename Rule::Hyper values;
  std::memcpy(&values, hyper, sizeof values);
  return values;
}

template <class Rule>
constexpr RuleInfo describe(const char* name) {
  using Narrow = typename Rule::template Constants<float>;
  using Wide = typename Rule::template Constants<double>;
  static_assert(sizeof(Wide) <= kMaxConstantBytes);
  return {
      .name = name,
      .hyper_names = Rule::hyper_names,
      .state_names = Rule::state_names,
      .counts_steps = Rule::counts_steps,
      .states_used = [](const double* hyper) { return Rule::states_used(unpack<Rule>(hyper)); },
      .prepare =
          [](const double* hyper, double step, bool wide, void* constants) {
            if (wide) {
              new (constants) Wide(Rule::template prepare<double>(unpack<Rule>(hyper), step));
            } else {
              new (constants) Narrow(Rule::template prepare<float>(unpack<Rule>(hyper), step));
            }
          },
  };
}

constexpr RuleInfo kTable[] = {
#define ONEPASS_X(name, Type) describe<Type>(#name),
    ONEPASS_RULES(ONEPASS_X)
#undef ONEPASS_X
};

}  // namespace

const RuleInfo& info_of(RuleId rule) { return kTable[static_cast<int>(rule)]; }

}  // namespace onepass
