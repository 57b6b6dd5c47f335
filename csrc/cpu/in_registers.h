// Applies a rule to packed operands in 16-bit formats, which are converted in registers. In a cache this takes 0.5 to
// 0.95 of the time of conversion through tiles.
#pragma once

#include "cpu/float_vector.h"

#ifdef ONEPASS_FLOAT_VECTOR

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <iterator>
#include <type_traits>
#include <utility>

#include "cpu/apply.h"
#include "cpu/convert.h"
#include "formats/with_format.h"
#include "job.h"
#include "target.h"

namespace onepass::inline ONEPASS_TARGET {

// The formats of a rule's operands.
struct Formats {
  Format param_and_grad;
  Format states;

  constexpr Format of(std::size_t operand) const { return operand < kFirstState ? param_and_grad : states; }
  constexpr std::int64_t size(std::size_t operand) const { return static_cast<std::int64_t>(size_of(of(operand))); }
};

template <std::size_t K>
using Index = std::integral_constant<std::size_t, K>;

// Elements that a kernel steps at once.
inline constexpr std::int64_t kUnit = 2 * kVectorWidth;
static_assert(kTile<float> % kUnit == 0);

// Applies the rule to packed operands in these formats; n is a multiple of kUnit.
template <class Rule, unsigned Set, Formats formats>
void apply_in_registers(const Job& job, std::byte* const* data, std::int64_t n, std::int64_t tiles_ahead) {
  // Any order of the elements is correct if all operands have the same order.
  constexpr bool alternating =
      formats.param_and_grad == Format::bfloat16 && (formats.states == Format::bfloat16 || Set == 0);
  const auto constants = constants_of<Rule, float, Set>(job);
  const auto factor = static_cast<float>(job.grad_factor);
  [&]<std::size_t... K>(std::index_sequence<K...> /*operands*/) __attribute__((always_inline)) {
    std::byte* const own[] = {data[K]...};
    const auto step_unit = [&](std::int64_t i) __attribute__((always_inline)) {
      // The compiler keeps each of these arrays in a register.
      alignas(64) float first[sizeof...(K)][kVectorWidth];
      alignas(64) float second[sizeof...(K)][kVectorWidth];
      const auto load = [&]<std::size_t k>(Index<k>) __attribute__((always_inline)) {
        if constexpr (is_used<Set>(k)) {
          using Codec = std::conditional_t<alternating, Alternating, CodecOf<formats.of(k)>>;
          const VectorPair values = load_pair(Codec{}, own[k] + i * formats.size(k));
          store_vector(Float32{}, as_bytes(first[k]), values.first);
          store_vector(Float32{}, as_bytes(second[k]), values.second);
        }
      };
      const auto store = [&]<std::size_t k>(Index<k>) __attribute__((always_inline)) {
        if constexpr (is_used<Set>(k) && k != kGrad) {
          using Codec = std::conditional_t<alternating, Alternating, CodecOf<formats.of(k)>>;
          store_pair(Codec{}, own[k] + i * formats.size(k),
                     {load_vector(Float32{}, as_bytes(first[k])), load_vector(Float32{}, as_bytes(second[k]))});
        }
      };
      const auto step = [&](auto& values) __attribute__((always_inline)) {
        float* const arrays[] = {values[K]...};
        apply<Rule, float, Set>(constants, factor, arrays, kVectorWidth,
                                std::make_index_sequence<Rule::state_names.size()>{});
      };
      (load(Index<K>{}), ...);
      step(first);
      step(second);
      (store(Index<K>{}), ...);
    };
    for_each_prefetched<float>(
        n, tiles_ahead,
        [&](std::int64_t begin) __attribute__((always_inline)) {
          const auto fetch = [&]<std::size_t k>(Index<k>) __attribute__((always_inline)) {
            if constexpr (is_used<Set>(k)) prefetch(own[k] + begin * formats.size(k), kTile<float> * formats.size(k));
          };
          (fetch(Index<K>{}), ...);
        },
        [&](std::int64_t begin, std::int64_t count) __attribute__((always_inline)) {
          for (std::int64_t i = begin; i < begin + count; i += kUnit) step_unit(i);
        });
  }(std::make_index_sequence<kOperands<Rule>>{});
}

// The combinations that have kernels: 16-bit models with states in the same format or (bfloat16) in float32, and
// float32 models with states in bfloat16.
inline constexpr Formats kInRegisters[] = {
    {Format::bfloat16, Format::bfloat16},
    {Format::bfloat16, Format::float32},
    {Format::float32, Format::bfloat16},
    {Format::float16, Format::float16},
};

inline bool all_in(const Job& job, const Formats& formats) {
  return all_operands(job, [&](std::size_t k, const Operand& operand) { return operand.format == formats.of(k); });
}

// Returns the kernel for the formats of a job; null if there is none.
template <class Rule, unsigned Set>
Apply find_in_registers(const Job& job) {
  Apply found = nullptr;
  const auto look = [&]<std::size_t k>(Index<k>) {
    constexpr Formats formats = kInRegisters[k];
    if constexpr (Set != 0 || formats.param_and_grad == formats.states)
      if (all_in(job, formats)) found = &apply_in_registers<Rule, Set, formats>;
  };
  [&]<std::size_t... I>(std::index_sequence<I...>) {
    (look(Index<I>{}), ...);
  }(std::make_index_sequence<std::size(kInRegisters)>{});
  return found;
}

// Steps the last elements of a range, fewer than kUnit, in copies.
inline void apply_to_rest(Apply rule, const Job& job, std::int64_t begin, std::int64_t n) {
  alignas(64) std::byte copies[kFirstFollower][kUnit * sizeof(float)] = {};
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
  rule(job, data, kUnit, 0);
  for_each_array([&](std::size_t k, std::byte* own, std::size_t bytes) {
    if (k != kGrad) std::memcpy(own, copies[k], bytes);
  });
}

}  // namespace onepass::inline ONEPASS_TARGET

#endif  // ONEPASS_FLOAT_VECTOR
