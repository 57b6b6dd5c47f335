// A rule over arrays, vectorised by the compiler.
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>

#include "job.h"
#include "target.h"

namespace onepass::inline ONEPASS_TARGET {

// The operands of a rule, without followers.
template <class Rule>
inline constexpr std::size_t kOperands = kFirstState + Rule::state_names.size();

template <unsigned Set>
constexpr bool is_used(std::size_t operand) {
  return operand < kFirstState || (Set >> (operand - kFirstState) & 1) != 0;
}

template <class Rule, class T>
using ConstantsOf = typename Rule::template Constants<T>;

// A job's constants, with those that the set of states fixes as constants of the compiler (`settle`, if the rule has
// it).
template <class Rule, class T, unsigned Set>
ONEPASS_INLINE ConstantsOf<Rule, T> constants_of(const Job& job) {
  auto constants = *static_cast<const ConstantsOf<Rule, T>*>(job.constants);
  if constexpr (requires { Rule::template settle<Set>(constants); }) Rule::template settle<Set>(constants);
  return constants;
}

// The rule over n elements of plain arrays. States that are not in `Set` read as zero, and what the rule makes of them
// is dropped; being constants, they cost nothing. Operands may be one and the same array (a gradient that is the
// parameter); they never overlap otherwise, which is what `ivdep` promises the vectoriser.
template <class Rule, class T, unsigned Set, std::size_t... State>
ONEPASS_INLINE void apply(const ConstantsOf<Rule, T>& constants, T factor, T* const* arrays, std::int64_t n,
                          std::index_sequence<State...> /*states*/) {
  T* param = arrays[kParam];
  const T* grad = arrays[kGrad];
  [[maybe_unused]] T* const states[] = {arrays[kFirstState + State]..., nullptr};
#pragma GCC ivdep
#pragma GCC unroll 1  // gcc vectorises no loop that it has unrolled, as it would one over a register
  for (std::int64_t i = 0; i < n; ++i) {
    T p = param[i];
    [[maybe_unused]] T s[] = {((Set >> State & 1) != 0 ? states[State][i] : T(0))..., T(0)};
    Rule::update(constants, p, factor * grad[i], s[State]...);
    param[i] = p;
    (((Set >> State & 1) != 0 ? void(states[State][i] = s[State]) : void()), ...);
  }
}

// Steps n elements, whose operands begin at `data`: a rule with a set of states, for one combination of formats.
using Apply = void (*)(const Job& job, std::byte* const* data, std::int64_t n);

template <class Rule, class T, unsigned Set>
void apply_to_arrays(const Job& job, std::byte* const* data, std::int64_t n) {
  T* arrays[kOperands<Rule>];
  for (std::size_t k = 0; k < kOperands<Rule>; ++k) arrays[k] = reinterpret_cast<T*>(data[k]);
  const auto constants = constants_of<Rule, T, Set>(job);
  apply<Rule, T, Set>(constants, static_cast<T>(job.grad_factor), arrays, n,
                      std::make_index_sequence<Rule::state_names.size()>{});
}

// Whether all operands that there are satisfy a condition on their number and themselves.
template <class Condition>
ONEPASS_INLINE bool all_operands(const Job& job, Condition&& condition) {
  bool all = true;
  for (std::size_t k = 0; k < kFirstFollower; ++k)
    all = all && (job.operands[k].data == nullptr || condition(k, job.operands[k]));
  return all;
}

}  // namespace onepass::inline ONEPASS_TARGET
