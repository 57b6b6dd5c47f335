// The element-wise driver: one pass over a range of a tensor, in tiles that stay in the L1 cache.
//
// An operand that is stored in the arithmetic type and packed is used where it lies. Any other is decoded into a tile,
// and encoded back after the rule. So a rule meets only plain arrays, and formats and rules do not multiply.
//
// With a sparse gradient the range is one of the touched rows, laid end to end. Rows that are long are used where they
// lie, short ones collected in the tile; the gradient's entries for a row are added up on their way into the tile.
#pragma once

#include <cstdint>
#include <utility>

#include "cpu/convert.h"
#include "cpu/rows.h"
#include "cpu/runs.h"
#include "cpu/tile.h"
#include "job.h"
#include "rules/math.h"
#include "target.h"

namespace onepass::inline ONEPASS_TARGET {

// Prefetch distance. A hardware prefetcher follows arrays that are read in order, but starts anew in each page, and
// stops while the processor decodes and computes. On an Intel Xeon, 16-bit formats took 0.6 to 0.8 of the time with
// this, float32 0.8 to 0.95.
inline constexpr std::int64_t kTilesAhead = 2;

// The rule over n elements of plain arrays. States that are not in `Set` read as zero, and what the rule makes of them
// is dropped; being constants, they cost nothing. Operands may be one and the same array (a gradient that is the
// parameter); they never overlap otherwise, which is what `ivdep` promises the vectoriser.
template <class Rule, class T, unsigned Set, std::size_t... State>
ONEPASS_INLINE void apply(const typename Rule::template Constants<T>& constants, T factor, T* const* arrays,
                          std::int64_t n, std::index_sequence<State...> /*states*/) {
  T* param = arrays[kParam];
  const T* grad = arrays[kGrad];
  [[maybe_unused]] T* const states[] = {arrays[kFirstState + State]..., nullptr};
#pragma GCC ivdep
  for (std::int64_t i = 0; i < n; ++i) {
    T p = param[i];
    [[maybe_unused]] T s[] = {((Set >> State & 1) != 0 ? states[State][i] : T(0))..., T(0)};
    Rule::update(constants, p, factor * grad[i], s[State]...);
    param[i] = p;
    (((Set >> State & 1) != 0 ? void(states[State][i] = s[State]) : void()), ...);
  }
}

// Updates elements [begin, begin + n) of a job's followers. `param` holds these elements of the parameter
// (followers.h).
template <class T>
void follow(const Job& job, std::int64_t begin, std::int64_t n, T* param);

inline bool has_followers(const Job& job) {
  const Operand* operands = job.operands.data();
  for (std::size_t k = kFirstFollower; k < kMaxOperands; ++k)
    if (operands[k].data != nullptr) return true;
  return false;
}

// Asks for elements [begin, begin + n) of a packed operand.
ONEPASS_INLINE void prefetch(const Operand& operand, std::int64_t begin, std::int64_t n) {
  const auto size = static_cast<std::int64_t>(size_of(operand.format));
  const std::byte* from = operand.data + begin * size;
  for (std::int64_t b = 0; b < n * size; b += kLine) __builtin_prefetch(from + b);
}

// Steps elements [begin, end) of a job that has this set of the rule's states.
template <class Rule, class T, unsigned Set>
void run_with(const Job& job, std::int64_t begin, std::int64_t end) {
  constexpr std::size_t operands = kFirstState + Rule::state_names.size();
  constexpr auto used = [](std::size_t k) { return k < kFirstState || (Set >> (k - kFirstState) & 1) != 0; };
  alignas(64) T tiles[operands][kTile<T>];
  bool in_place[operands];
  const bool packed = job.rows == nullptr && job.layout == nullptr;
  const bool long_rows = job.rows != nullptr && job.rows->length >= kLongRow;
  for (std::size_t k = 0; k < operands; ++k)
    in_place[k] = (packed || (long_rows && k != kGrad)) && is_plain_array<T>(job.operands[k]);
  const auto constants = *static_cast<const typename Rule::template Constants<T>*>(job.constants);
  const T factor = static_cast<T>(job.grad_factor);
  const bool followed = has_followers(job);

  std::int64_t n = 0;
  for (std::int64_t at = begin; at < end; at += n) {
    n = end - at < kTile<T> ? end - at : kTile<T>;
    std::int64_t offset = at;  // of the element in operands that are used in place
    if (long_rows) {
      const std::int64_t column = at % job.rows->length;
      offset = row_number(*job.rows, at / job.rows->length) * job.rows->length + column;
      if (job.rows->length - column < n) n = job.rows->length - column;
    }
    if (packed && at + (kTilesAhead + 1) * kTile<T> <= end)
      for (std::size_t k = 0; k < operands; ++k)
        if (used(k)) prefetch(job.operands[k], at + kTilesAhead * kTile<T>, kTile<T>);
    T* arrays[operands];
    for (std::size_t k = 0; k < operands; ++k) {
      arrays[k] = in_place[k] ? reinterpret_cast<T*>(job.operands[k].data) + offset : tiles[k];
      if (used(k) && !in_place[k]) decode(job, k, at, n, arrays[k]);
    }
    apply<Rule, T, Set>(constants, factor, arrays, n, std::make_index_sequence<Rule::state_names.size()>{});
    if (followed) follow(job, at, n, arrays[kParam]);
    for (std::size_t k = 0; k < operands; ++k)
      if (used(k) && k != kGrad && !in_place[k]) encode(job, k, at, n, arrays[k]);
  }
}

// Steps elements [begin, end) of a job: a kernel. The states that it has must be one of the rule's `state_sets`.
template <class Rule, class T>
void run(const Job& job, std::int64_t begin, std::int64_t end) {
  unsigned held = 0;
  for (std::size_t k = 0; k < Rule::state_names.size(); ++k)
    if (job.operands[kFirstState + k].data != nullptr) held |= 1U << k;
  [&]<std::size_t... I>(std::index_sequence<I...> /*sets*/) {
    ((held == Rule::state_sets[I] ? run_with<Rule, T, Rule::state_sets[I]>(job, begin, end) : void()), ...);
  }(std::make_index_sequence<Rule::state_sets.size()>{});
}

}  // namespace onepass::inline ONEPASS_TARGET
