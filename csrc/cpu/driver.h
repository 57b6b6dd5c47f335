// The element-wise driver: one pass over a range of a tensor, by the first of these that applies:
//
// - All operands are packed arrays of the arithmetic type: the rule runs over them where they lie.
// - All are packed, in one of the usual combinations of formats: each combination has a kernel of its own, which loads
//   a register of every operand, converts, applies the rule, converts and stores.
// - Otherwise operands are decoded into tiles that stay in the L1 cache, and encoded back after the rule.
//
// So a rule meets only plain arrays of the arithmetic type.
//
// With a sparse gradient the range is one of the touched rows, laid end to end. Rows that are long are used where they
// lie, short ones collected in the tile; the gradient's entries for a row are added up on their way into the tile.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "cpu/convert.h"
#include "cpu/float_vector.h"
#include "cpu/rows.h"
#include "cpu/runs.h"
#include "cpu/tile.h"
#include "cpu/tuning.h"
#include "job.h"
#include "rules/math.h"
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
  for (std::int64_t i = 0; i < n; ++i) {
    T p = param[i];
    [[maybe_unused]] T s[] = {((Set >> State & 1) != 0 ? states[State][i] : T(0))..., T(0)};
    Rule::update(constants, p, factor * grad[i], s[State]...);
    param[i] = p;
    (((Set >> State & 1) != 0 ? void(states[State][i] = s[State]) : void()), ...);
  }
}

// Steps n elements, whose operands begin at `data`.
using Apply = void (*)(const Job& job, std::byte* const* data, std::int64_t n);

template <class Rule, class T, unsigned Set>
void apply_to_arrays(const Job& job, std::byte* const* data, std::int64_t n) {
  T* arrays[kOperands<Rule>];
  for (std::size_t k = 0; k < kOperands<Rule>; ++k) arrays[k] = reinterpret_cast<T*>(data[k]);
  const auto constants = *static_cast<const ConstantsOf<Rule, T>*>(job.constants);
  apply<Rule, T, Set>(constants, static_cast<T>(job.grad_factor), arrays, n,
                      std::make_index_sequence<Rule::state_names.size()>{});
}

// Formats of a rule's operands.
struct Formats {
  Format param_and_grad;
  Format states;

  constexpr Format of(std::size_t operand) const { return operand < kFirstState ? param_and_grad : states; }
  constexpr std::int64_t size(std::size_t operand) const { return static_cast<std::int64_t>(size_of(of(operand))); }
};

template <std::size_t K>
using Index = std::integral_constant<std::size_t, K>;

// The same for operands in these formats, converted in registers; n is a multiple of kVectorWidth. 16-bit formats take
// 0.55 to 0.85 of the time that they take through tiles, in a cache.
template <class Rule, unsigned Set, Formats formats>
void apply_in_registers(const Job& job, std::byte* const* data, std::int64_t n) {
  const auto constants = *static_cast<const ConstantsOf<Rule, float>*>(job.constants);
  const auto factor = static_cast<float>(job.grad_factor);
  [&]<std::size_t... K>(std::index_sequence<K...> /*operands*/) __attribute__((always_inline)) {
    std::byte* const own[] = {data[K]...};
    for (std::int64_t i = 0; i < n; i += kVectorWidth) {
      alignas(64) float values[sizeof...(K)][kVectorWidth];  // the compiler keeps each in a register
      float* const arrays[] = {values[K]...};
      const auto load = [&]<std::size_t k>(Index<k>) __attribute__((always_inline)) {
        if constexpr (is_used<Set>(k))
          store_vector(Float32{}, as_bytes(values[k]),
                       load_vector(CodecOf<formats.of(k)>{}, own[k] + i * formats.size(k)));
      };
      const auto store = [&]<std::size_t k>(Index<k>) __attribute__((always_inline)) {
        if constexpr (is_used<Set>(k) && k != kGrad)
          store_vector(CodecOf<formats.of(k)>{}, own[k] + i * formats.size(k),
                       load_vector(Float32{}, as_bytes(values[k])));
      };
      (load(Index<K>{}), ...);
      apply<Rule, float, Set>(constants, factor, arrays, kVectorWidth,
                              std::make_index_sequence<Rule::state_names.size()>{});
      (store(Index<K>{}), ...);
    }
  }(std::make_index_sequence<kOperands<Rule>>{});
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

// Prefetches elements [begin, begin + n) of a packed operand.
ONEPASS_INLINE void prefetch(const Operand& operand, std::int64_t begin, std::int64_t n) {
  const std::byte* past = element(operand, begin + n);
  for (const std::byte* line = element(operand, begin); line < past; line += kLine) __builtin_prefetch(line);
}

// Prefetches the tile of packed operands that lies `tiles_ahead` of the one at `at`, unless the range ends before.
// (Inlined, for gcc removes a call to a function that does nothing but prefetch.)
ONEPASS_INLINE void prefetch_ahead(const Job& job, std::int64_t at, std::int64_t end, std::int64_t tile,
                                   const Tuning& tuning) {
  const std::int64_t begin = at + tuning.tiles_ahead * tile;
  if (tuning.tiles_ahead == 0 || begin + tile > end) return;
  for (std::size_t k = 0; k < kFirstFollower; ++k)
    if (job.operands[k].data != nullptr) prefetch(job.operands[k], begin, tile);
}

// Applies a rule to fewer than kVectorWidth elements in registers, by way of copies.
inline void apply_to_rest(Apply rule, const Job& job, std::int64_t begin, std::int64_t n) {
  alignas(64) std::byte copies[kFirstFollower][kVectorWidth * sizeof(float)] = {};
  std::byte* data[kFirstFollower];
  for (std::size_t k = 0; k < kFirstFollower; ++k) data[k] = copies[k];
  const auto for_each_array = [&](auto&& copy) {
    for (std::size_t k = 0; k < kFirstFollower; ++k) {
      const Operand& operand = job.operands[k];
      if (operand.data != nullptr)
        copy(k, element(operand, begin), static_cast<std::size_t>(n) * size_of(operand.format));
    }
  };
  for_each_array([&](std::size_t k, const std::byte* own, std::size_t bytes) { std::memcpy(copies[k], own, bytes); });
  rule(job, data, kVectorWidth);
  for_each_array([&](std::size_t k, std::byte* own, std::size_t bytes) {
    if (k != kGrad) std::memcpy(own, copies[k], bytes);
  });
}

// Steps elements [begin, end) of packed operands where they lie, a multiple of `unit` at a time: a tile, or without
// prefetch all of them, because each call costs some ten nanoseconds.
inline void run_packed(Apply rule, const Job& job, std::int64_t begin, std::int64_t end, std::int64_t unit,
                       const Tuning& tuning) {
  const std::int64_t tile = job.wide ? kTile<double> : kTile<float>;
  const std::int64_t whole = end - (end - begin) % unit;
  const std::int64_t most = tuning.tiles_ahead == 0 ? whole - begin : tile;
  for (std::int64_t at = begin; at < whole; at += most) {
    prefetch_ahead(job, at, end, tile, tuning);
    std::byte* data[kFirstFollower] = {};
    for (std::size_t k = 0; k < kFirstFollower; ++k)
      if (job.operands[k].data != nullptr) data[k] = element(job.operands[k], at);
    rule(job, data, whole - at < most ? whole - at : most);
  }
  if (whole < end) apply_to_rest(rule, job, whole, end - whole);
}

// Steps elements [begin, end) of operands in every format and layout, through tiles.
template <class T>
void run_in_tiles(Apply rule, const Job& job, std::int64_t begin, std::int64_t end, const Tuning& tuning) {
  alignas(64) T tiles[kFirstFollower][kTile<T>];
  bool in_place[kFirstFollower];
  const bool packed = job.rows == nullptr && job.layout == nullptr;
  const bool long_rows = job.rows != nullptr && job.rows->length >= kLongRow;
  for (std::size_t k = 0; k < kFirstFollower; ++k)
    in_place[k] = (packed || (long_rows && k != kGrad)) && is_plain_array<T>(job.operands[k]);
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
    if (packed) prefetch_ahead(job, at, end, kTile<T>, tuning);
    std::byte* data[kFirstFollower] = {};
    for (std::size_t k = 0; k < kFirstFollower; ++k) {
      if (job.operands[k].data == nullptr) continue;
      data[k] = in_place[k] ? element(job.operands[k], offset) : as_bytes(tiles[k]);
      if (!in_place[k]) decode(job, k, at, n, tiles[k]);
    }
    rule(job, data, n);
    if (followed) follow(job, at, n, reinterpret_cast<T*>(data[kParam]));
    for (std::size_t k = 0; k < kFirstFollower; ++k)
      if (job.operands[k].data != nullptr && k != kGrad && !in_place[k]) encode(job, k, at, n, tiles[k]);
  }
}

// Whether all operands that there are satisfy a condition on their number and themselves.
template <class Condition>
ONEPASS_INLINE bool all_operands(const Job& job, Condition&& condition) {
  bool all = true;
  for (std::size_t k = 0; k < kFirstFollower; ++k)
    all = all && (job.operands[k].data == nullptr || condition(k, job.operands[k]));
  return all;
}

template <class T>
bool all_plain_arrays(const Job& job) {
  return all_operands(job, [](std::size_t, const Operand& operand) { return is_plain_array<T>(operand); });
}

inline bool all_in(const Job& job, const Formats& formats) {
  return all_operands(job, [&](std::size_t k, const Operand& operand) { return operand.format == formats.of(k); });
}

// The combinations that have kernels of their own: models in 16 bits with states like the parameters or in float32, and
// states in bfloat16 beside float32.
inline constexpr Formats kInRegisters[] = {
    {Format::bfloat16, Format::bfloat16},
    {Format::bfloat16, Format::float32},
    {Format::float32, Format::bfloat16},
#if defined(__F16C__)
    {Format::float16, Format::float16},
#endif
};

// Steps elements [begin, end) of a job that has this set of the rule's states.
template <class Rule, class T, unsigned Set>
void run_with(const Job& job, std::int64_t begin, std::int64_t end, const Tuning& tuning) {
  constexpr Apply in_arrays = &apply_to_arrays<Rule, T, Set>;
  if (job.rows == nullptr && job.layout == nullptr && !has_followers(job)) {
    if (all_plain_arrays<T>(job)) return run_packed(in_arrays, job, begin, end, 1, tuning);
    if constexpr (sizeof(T) == sizeof(float)) {
      Apply in_registers = nullptr;
      const auto choose = [&]<std::size_t k>(Index<k>) {
        constexpr Formats formats = kInRegisters[k];
        if constexpr (Set != 0 || formats.param_and_grad == formats.states)
          if (all_in(job, formats)) in_registers = &apply_in_registers<Rule, Set, formats>;
      };
      [&]<std::size_t... I>(std::index_sequence<I...>) {
        (choose(Index<I>{}), ...);
      }(std::make_index_sequence<std::size(kInRegisters)>{});
      if (in_registers != nullptr) return run_packed(in_registers, job, begin, end, kVectorWidth, tuning);
    }
  }
  run_in_tiles<T>(in_arrays, job, begin, end, tuning);
}

// Steps elements [begin, end) of a job: a kernel. The states that it has must be one of the rule's `state_sets`.
template <class Rule, class T>
void run(const Job& job, std::int64_t begin, std::int64_t end, const Tuning& tuning) {
  unsigned held = 0;
  for (std::size_t k = 0; k < Rule::state_names.size(); ++k)
    if (job.operands[kFirstState + k].data != nullptr) held |= 1U << k;
  [&]<std::size_t... I>(std::index_sequence<I...> /*sets*/) {
    ((held == Rule::state_sets[I] ? run_with<Rule, T, Rule::state_sets[I]>(job, begin, end, tuning) : void()), ...);
  }(std::make_index_sequence<Rule::state_sets.size()>{});
}

}  // namespace onepass::inline ONEPASS_TARGET
