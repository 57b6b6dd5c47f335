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
#include "formats/stochastic.h"
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
static_assert(kTile<float> % kUnit == 0 && kStretch<float> % kUnit == 0);

// The random bits of kUnit elements, for stochastic rounding to bfloat16. `Alternate`: the elements have that order.
template <bool Alternate>
class RandomUnits {
 public:
  // The first element has this index in the whole tensor. The upper 32 bits of all indices are the same.
  ONEPASS_INLINE void start(std::uint64_t key, std::int64_t first) {
    for (std::size_t pair = 0; pair < kPairs; ++pair) products_[pair] = first_product(key, 2 * pair, first);
  }

  // Makes the bits of elements [i, i + kUnit) that two streams share.
  ONEPASS_INLINE void make(std::size_t pair, std::int64_t i) {
    const std::uint32_t product = products_[pair] + static_cast<std::uint32_t>(i) * kIndexFactor;
    const BitVector numbers = numbers_from(0);
    random_[pair][0] = random_bits(BitVector((Alternate ? numbers * 2 : numbers) * kIndexFactor + product));
    random_[pair][1] = random_bits(
        BitVector((Alternate ? numbers * 2 + 1 : numbers + std::uint32_t{kVectorWidth}) * kIndexFactor + product));
  }

  // Returns bits whose upper half is the value of one half of the unit, rounded.
  ONEPASS_INLINE BitVector rounded(std::size_t stream, int half, FloatVector values) const {
    const BitVector random = random_[stream / 2][half];
    const auto bits = std::bit_cast<BitVector>(values);
    return values != values ? bits | 0x400000U : bits + (stream % 2 != 0 ? random & 0xffffU : random >> 16);
  }

 private:
  static constexpr std::size_t kPairs = kParamStream / 2 + 1;
  std::uint32_t products_[kPairs];
  BitVector random_[kPairs][2];
};

// Applies the rule to a register of each operand.
template <class Rule, unsigned Set>
ONEPASS_INLINE void apply_to_register(const ConstantsOf<Rule, float>& constants, float factor,
                                      float (&values)[kOperands<Rule>][kVectorWidth]) {
  [&]<std::size_t... K>(std::index_sequence<K...> /*operands*/) __attribute__((always_inline)) {
    float* const arrays[] = {values[K]...};
    apply<Rule, float, Set>(constants, factor, arrays, kVectorWidth,
                            std::make_index_sequence<Rule::state_names.size()>{});
  }(std::make_index_sequence<kOperands<Rule>>{});
}

// Applies the rule to packed operands in these formats; n is a multiple of kUnit. `kStochastic`: operands in bfloat16
// are rounded stochastically.
template <class Rule, unsigned Set, Formats formats, bool kStochastic = false>
void apply_in_registers(const Job& job, std::byte* const* data, std::int64_t n, std::int64_t bytes_ahead) {
  // Any order of the elements is correct if all operands have the same order.
  constexpr bool alternating =
      formats.param_and_grad == Format::bfloat16 && (formats.states == Format::bfloat16 || Set == 0);
  const auto constants = constants_of<Rule, float, Set>(job);
  const auto factor = static_cast<float>(job.grad_factor);
  [&]<std::size_t... K>(std::index_sequence<K...> /*operands*/) __attribute__((always_inline)) {
    std::byte* const own[] = {data[K]...};
    RandomUnits<alternating> random;
    if constexpr (kStochastic) {
      const std::int64_t at = (data[kParam] - job.operands.data()[kParam].data) / formats.size(kParam);
      random.start(job.rounding.key, job.rounding.first + at);
    }
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
        constexpr bool is_written = is_used<Set>(k) && k != kGrad;
        if constexpr (is_written && kStochastic && formats.of(k) == Format::bfloat16) {
          constexpr std::size_t stream = k == kParam ? kParamStream : k - kFirstState;
          if constexpr (stream % 2 == 0 || !is_used<Set>(k - 1)) random.make(stream / 2, i);
          const BitVector a = random.rounded(stream, 0, load_vector(Float32{}, as_bytes(first[k])));
          const BitVector b = random.rounded(stream, 1, load_vector(Float32{}, as_bytes(second[k])));
          if constexpr (alternating) {
            store_bytes(own[k] + i * formats.size(k), (a >> 16) | (b & 0xffff0000U));
          } else {
            store_bytes(own[k] + i * formats.size(k), upper_halves(a, b));
          }
        } else if constexpr (is_written) {
          using Codec = std::conditional_t<alternating, Alternating, CodecOf<formats.of(k)>>;
          store_pair(Codec{}, own[k] + i * formats.size(k),
                     {load_vector(Float32{}, as_bytes(first[k])), load_vector(Float32{}, as_bytes(second[k]))});
        }
      };
      (load(Index<K>{}), ...);
      apply_to_register<Rule, Set>(constants, factor, first);
      apply_to_register<Rule, Set>(constants, factor, second);
      (store(Index<K>{}), ...);
    };
    for_each_prefetched<float>(
        n, bytes_ahead,
        [&](std::int64_t begin) __attribute__((always_inline)) {
          const auto fetch = [&]<std::size_t k>(Index<k>) __attribute__((always_inline)) {
            if constexpr (is_used<Set>(k))
              prefetch(own[k] + begin * formats.size(k), kStretch<float> * formats.size(k));
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

// Whether elements [begin, end) of a job have indices in the whole tensor with the same upper 32 bits.
inline bool has_one_upper_half(const Job& job, std::int64_t begin, std::int64_t end) {
  return (job.rounding.first + begin) >> 32 == (job.rounding.first + end - 1) >> 32;
}

// Returns the kernel for elements [begin, end) of a job by its formats; null if there is none. For stochastic rounding,
// there are kernels of bfloat16 models only.
template <class Rule, unsigned Set>
Apply find_in_registers(const Job& job, std::int64_t begin, std::int64_t end) {
  Apply found = nullptr;
  const auto look = [&]<std::size_t k>(Index<k>) {
    constexpr Formats formats = kInRegisters[k];
    if constexpr (Set != 0 || formats.param_and_grad == formats.states) {
      if (!all_in(job, formats)) return;
      if (!job.rounding.stochastic) {
        found = &apply_in_registers<Rule, Set, formats>;
      } else if constexpr (formats.param_and_grad == Format::bfloat16) {
        if (has_one_upper_half(job, begin, end)) found = &apply_in_registers<Rule, Set, formats, true>;
      }
    }
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
