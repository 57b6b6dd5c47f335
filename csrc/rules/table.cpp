#include "rules/table.h"

#include <cstring>
#include <new>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>

#include "job.h"
#include "rules/adafactor.h"
#include "rules/all.h"
#include "rules/came.h"

namespace onepass {
namespace {

// Returns an array of doubles as a struct with named members: Hyper or Scalars.
template <class Named>
Named unpack(const double* numbers) {
  Named named;
  std::memcpy(&named, numbers, sizeof named);
  return named;
}

template <class Rule>
concept HasScalars = requires { typename Rule::Scalars; };

template <class Rule>
concept HasSums = requires { Rule::sums; };

template <class Rule>
concept TakesSparse = requires(const typename Rule::Hyper& hyper) { Rule::takes_sparse(hyper); };

template <class Rule>
concept RefusesDense = requires { requires !Rule::takes_dense; };

template <class Rule>
concept HasDivisors = requires { typename Rule::Divisors; };

template <class Rule>
const char* find_zero(const typename Rule::Divisors& divisors) {
  static_assert(sizeof divisors == Rule::divisor_names.size() * sizeof(double));
  std::array<double, Rule::divisor_names.size()> values{};
  std::memcpy(values.data(), &divisors, sizeof divisors);
  for (std::size_t i = 0; i < values.size(); ++i)
    if (values[i] == 0.0) return Rule::divisor_names[i];
  return nullptr;
}

template <class Rule, class T>
void construct(const double* hyper, double step, [[maybe_unused]] const double* scalars, void* constants) {
  using Constants = typename Rule::template Constants<T>;
  static_assert(sizeof(Constants) <= kMaxConstantBytes);
  const auto h = unpack<typename Rule::Hyper>(hyper);
  if constexpr (HasScalars<Rule>) {
    new (constants) Constants(Rule::template prepare<T>(h, step, unpack<typename Rule::Scalars>(scalars)));
  } else {
    new (constants) Constants(Rule::template prepare<T>(h, step));
  }
}

template <class Rule>
inline constexpr bool kSumsSetScalars = !std::is_void_v<decltype(Rule::use_sums(
    std::declval<typename Rule::template Constants<float>&>(), std::declval<const double*>(), 0.0))>;

template <class Rule, class T>
void complete(const double* sums, double elements, void* constants, [[maybe_unused]] double* scalars) {
  auto& completed = *static_cast<typename Rule::template Constants<T>*>(constants);
  if constexpr (kSumsSetScalars<Rule>) {
    const typename Rule::Scalars after = Rule::use_sums(completed, sums, elements);
    std::memcpy(scalars, &after, sizeof after);
  } else {
    Rule::use_sums(completed, sums, elements);
  }
}

template <RuleId id, class Rule>
constexpr RuleInfo describe(const char* name) {
  static_assert(Rule::id == id, "a line of registry.h names the struct of another rule");
  static_assert(sizeof(typename Rule::Hyper) == Rule::hyper_names.size() * sizeof(double));
  static_assert(Rule::hyper_names.size() <= kMaxHyper && Rule::state_names.size() <= kMaxStates);
  RuleInfo info{
      .name = name,
      .hyper_names = Rule::hyper_names,
      .state_names = Rule::state_names,
      .state_codings = {},
      .scalar_names = {},
      .counts_steps = Rule::counts_steps,
      .constants_size = {sizeof(typename Rule::template Constants<float>),
                         sizeof(typename Rule::template Constants<double>)},
      .states_used = [](const double* hyper) { return Rule::states_used(unpack<typename Rule::Hyper>(hyper)); },
      .takes_sparse = [](const double*) { return false; },
      .takes_dense = !RefusesDense<Rule>,
      .prepare =
          [](const double* hyper, double step, const double* scalars, bool wide, void* constants) {
            (wide ? construct<Rule, double> : construct<Rule, float>)(hyper, step, scalars, constants);
          },
      .sums = 0,
      .sums_set_scalars = false,
      .sums_only_for_scalars = false,
      .takes_sums = [](const double*) { return false; },
      .use_sums = [](bool, const double*, double, void*, double*) {},
      .zero_divisor = [](const double*, double, const double*) -> const char* { return nullptr; },
      .advance = [](const double*, double, double*) {},
  };
  if constexpr (HasSums<Rule>) {
    static_assert(Rule::sums <= kMaxSums);
    info.sums = Rule::sums;
    info.sums_set_scalars = kSumsSetScalars<Rule>;
    info.sums_only_for_scalars = requires { requires Rule::sums_only_for_scalars; };
    info.takes_sums = [](const double* hyper) {
      const auto h = unpack<typename Rule::Hyper>(hyper);
      if constexpr (requires { Rule::takes_sums(h); }) return Rule::takes_sums(h);
      return true;
    };
    info.use_sums = [](bool wide, const double* sums, double elements, void* constants, double* scalars) {
      (wide ? complete<Rule, double> : complete<Rule, float>)(sums, elements, constants, scalars);
    };
  }
  if constexpr (requires { Rule::state_codings; }) {
    static_assert(Rule::state_codings.size() == Rule::state_names.size());
    info.state_codings = Rule::state_codings;
  }
  if constexpr (HasDivisors<Rule>)
    info.zero_divisor = [](const double* hyper, double step, [[maybe_unused]] const double* scalars) {
      const auto h = unpack<typename Rule::Hyper>(hyper);
      if constexpr (HasScalars<Rule>) {
        return find_zero<Rule>(Rule::divisors(h, step, unpack<typename Rule::Scalars>(scalars)));
      } else {
        return find_zero<Rule>(Rule::divisors(h, step));
      }
    };
  if constexpr (TakesSparse<Rule>)
    info.takes_sparse = [](const double* hyper) { return Rule::takes_sparse(unpack<typename Rule::Hyper>(hyper)); };
  if constexpr (HasScalars<Rule>) {
    using Scalars = typename Rule::Scalars;
    static_assert(sizeof(Scalars) == Rule::scalar_names.size() * sizeof(double));
    static_assert(Rule::scalar_names.size() <= kMaxScalars);
    info.scalar_names = Rule::scalar_names;
    info.advance = [](const double* hyper, double step, double* scalars) {
      const Scalars after = Rule::advance(unpack<typename Rule::Hyper>(hyper), step, unpack<Scalars>(scalars));
      std::memcpy(scalars, &after, sizeof after);
    };
  }
  return info;
}

constexpr RuleInfo kTable[] = {
#define ONEPASS_X(name, Type) describe<RuleId::name, Type>(#name),
    ONEPASS_RULES(ONEPASS_X)
#undef ONEPASS_X
};

// Describes a rule whose means go across elements.
template <class Rule, class Hyper, class Constants, bool counts_steps>
constexpr RuleInfo describe_factored(const char* name) {
  static_assert(sizeof(Hyper) == Rule::hyper_names.size() * sizeof(double) && Rule::hyper_names.size() <= kMaxHyper);
  static_assert(sizeof(Constants) <= kMaxConstantBytes && Rule::state_names.size() <= kMaxStates + kMoreStates);
  return {
      .name = name,
      .hyper_names = Rule::hyper_names,
      .state_names = Rule::state_names,
      .state_codings = {},
      .scalar_names = {},
      .counts_steps = counts_steps,
      .constants_size = {sizeof(Constants), sizeof(Constants)},
      .states_used = [](const double*) { return Rule::kOfMatrix | Rule::kOfVector; },
      .takes_sparse = [](const double*) { return false; },
      .takes_dense = true,
      .prepare = [](const double* hyper, double step, const double*, bool,
                    void* constants) { new (constants) Constants(Rule::prepare(unpack<Hyper>(hyper), step)); },
      .sums = 0,
      .sums_set_scalars = false,
      .sums_only_for_scalars = false,
      .takes_sums = [](const double*) { return false; },
      .use_sums = [](bool, const double*, double, void*, double*) {},
      .zero_divisor = [](const double* hyper, double step,
                         const double*) { return find_zero<Rule>(Rule::divisors(unpack<Hyper>(hyper), step)); },
      .advance = [](const double*, double, double*) {},
  };
}

constexpr RuleInfo kAdafactor = describe_factored<Adafactor, AdafactorHyper, AdafactorConstants, true>("adafactor");
constexpr RuleInfo kCame = describe_factored<Came, CameHyper, CameConstants, false>("came");

}  // namespace

const RuleInfo& info_of(RuleId rule) { return kTable[static_cast<int>(rule)]; }

const RuleInfo& adafactor_info() { return kAdafactor; }

const RuleInfo& came_info() { return kCame; }

RuleId find_rule(std::string_view name) {
  for (int i = 0; i < kRules; ++i)
    if (name == kTable[i].name) return static_cast<RuleId>(i);
  throw std::invalid_argument("there is no rule named " + std::string(name));
}

}  // namespace onepass
