// Applies a rule to plain arrays, in a loop that the compiler vectorizes.
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

// A bit of a set of states, for kernels that mask updates (rules/cautious.h). Masks make steps of small tensors up to
// 1.5 times as long.
inline constexpr unsigned kMasked = 1U << kMaxStates;

// Whether a job's updates are masked.
template <class Rule, class T>
bool is_masked(const Job& job) {
  if constexpr (requires(const ConstantsOf<Rule, T>& constants) { constants.caution; }) {
    return static_cast<const ConstantsOf<Rule, T>*>(job.constants)->caution.masks();
  } else {
    return false;
  }
}

// Returns a job's constants. Those that the set of states fixes are compile-time constants (`settle`, if the rule has
// it).
template <class Rule, class T, unsigned Set>
ONEPASS_INLINE ConstantsOf<Rule, T> constants_of(const Job& job) {
  auto constants = *static_cast<const ConstantsOf<Rule, T>*>(job.constants);
  if constexpr ((Set & kMasked) == 0 && requires { constants.caution; }) constants.caution = {};
  if constexpr (requires { Rule::template settle<Set>(constants); }) Rule::template settle<Set>(constants);
  return constants;
}

// Applies the rule to n elements of plain arrays. States that are not in `Set` are read as the constant zero, and their
// new values are dropped, so they cost nothing. Two operands may be the same array (a gradient that is the parameter).
// They never overlap otherwise, which `ivdep` declares to the vectorizer.
template <class Rule, class T, unsigned Set, std::size_t... State>
ONEPASS_INLINE void apply(const ConstantsOf<Rule, T>& constants, T factor, T* const* arrays, std::int64_t n,
                          std::index_sequence<State...> /*states*/) {
  T* param = arrays[kParam];
  const T* grad = arrays[kGrad];
  [[maybe_unused]] T* const states[] = {arrays[kFirstState + State]..., nullptr};
#pragma GCC ivdep
#pragma GCC unroll 1  // gcc unrolls a loop over a single register, and then does not vectorize it
  for (std::int64_t i = 0; i < n; ++i) {
    T p = param[i];
    [[maybe_unused]] T s[] = {((Set >> State & 1) != 0 ? states[State][i] : T(0))..., T(0)};
    Rule::update(constants, p, factor * grad[i], s[State]...);
    param[i] = p;
    (((Set >> State & 1) != 0 ? void(states[State][i] = s[State]) : void()), ...);
  }
}

// Elements of a tile, for each operand. It is small, because the tiles of all operands share the L1 cache with the
// lines that are prefetched.
template <class T>
inline constexpr std::int64_t kTile = 1024 / sizeof(T);
inline constexpr std::int64_t kLine = 64;  // bytes of a cache line

// Prefetches `bytes` bytes. Inlined, because gcc removes a call to a function that only prefetches.
ONEPASS_INLINE void prefetch(const std::byte* from, std::int64_t bytes) {
  for (std::int64_t b = 0; b < bytes; b += kLine) __builtin_prefetch(from + b);
}

// Elements that are prefetched at once. Few, because a core has only some 16 buffers for lines that it waits for: tiles
// of 1 KiB took 1.02 to 1.25 times as long.
template <class T>
inline constexpr std::int64_t kStretch = 256 / sizeof(T);

// Calls visit(begin, count) for stretches of elements [0, n), each after prefetch_stretch(begin) for the stretch that
// is `bytes_ahead` further, in bytes of T. The last elements, for which nothing is left to prefetch, are visited at
// once; if `bytes_ahead` is 0, these are all.
template <class T, class Prefetch, class Visit>
ONEPASS_INLINE void for_each_prefetched(std::int64_t n, std::int64_t bytes_ahead, Prefetch&& prefetch_stretch,
                                        Visit&& visit) {
  const std::int64_t ahead = bytes_ahead / static_cast<std::int64_t>(sizeof(T));
  for (std::int64_t at = 0; at < n;) {
    const bool fetches = ahead > 0 && at + ahead + kStretch<T> <= n;
    if (fetches) prefetch_stretch(at + ahead);
    const std::int64_t count = fetches ? kStretch<T> : n - at;
    visit(at, count);
    at += count;
  }
}

// Steps n elements whose operands begin at `data`, with this prefetch distance. There is one for each rule, set of
// states and combination of formats. The loop over stretches is inside it, because a call for each would load all
// constants again.
using Apply = void (*)(const Job& job, std::byte* const* data, std::int64_t n, std::int64_t bytes_ahead);

template <class Rule, class T, unsigned Set>
void apply_to_arrays(const Job& job, std::byte* const* data, std::int64_t n, std::int64_t bytes_ahead) {
  const auto constants = constants_of<Rule, T, Set>(job);
  const auto factor = static_cast<T>(job.grad_factor);
  T* own[kOperands<Rule>];
  for (std::size_t k = 0; k < kOperands<Rule>; ++k) own[k] = reinterpret_cast<T*>(data[k]);
  for_each_prefetched<T>(
      n, bytes_ahead,
      [&](std::int64_t begin) __attribute__((always_inline)) {
        for (std::size_t k = 0; k < kOperands<Rule>; ++k)
          if (is_used<Set>(k)) prefetch(reinterpret_cast<std::byte*>(own[k] + begin), kStretch<T> * sizeof(T));
      },
      [&](std::int64_t begin, std::int64_t count) __attribute__((always_inline)) {
        T* arrays[kOperands<Rule>];
        for (std::size_t k = 0; k < kOperands<Rule>; ++k) arrays[k] = own[k] + begin;
        apply<Rule, T, Set>(constants, factor, arrays, count, std::make_index_sequence<Rule::state_names.size()>{});
      });
}

// Whether all operands of a job, without its followers, satisfy condition(index, operand).
template <class Condition>
ONEPASS_INLINE bool all_operands(const Job& job, Condition&& condition) {
  bool all = true;
  for (std::size_t k = 0; k < kFirstFollower; ++k)
    all = all && (job.operands[k].data == nullptr || condition(k, job.operands[k]));
  return all;
}

}  // namespace onepass::inline ONEPASS_TARGET
