// Applies a rule to packed operands whose states are all stored in blocks.
//
// A tile takes two loops. In the first, each block is decoded and stepped in registers, and what is to be stored of its
// states goes into tiles. Then the largest magnitudes determine the scales. The second loop encodes. In one loop, the
// chain of dependent instructions would be longer than what a processor overlaps with the next block.
#pragma once

#include "cpu/float_vector.h"

#ifdef ONEPASS_FLOAT_VECTOR

#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <utility>

#include "cpu/apply.h"
#include "cpu/block_tile.h"
#include "cpu/convert.h"
#include "cpu/in_registers.h"
#include "formats/microscaling.h"
#include "formats/with_format.h"
#include "job.h"
#include "target.h"

namespace onepass::inline ONEPASS_TARGET {

// Steps n elements, whole blocks of 32 in one row, from element `begin` on; `block` is the number of the first block.
using ApplyInBlocks = void (*)(const Job& job, std::int64_t begin, std::int64_t block, std::int64_t n,
                               std::int64_t tiles_ahead);

// How the parameter is stored.
enum class Storing : std::uint8_t {
  nearest,     // rounded to nearest
  split,       // bfloat16, with the low bits of its master
  stochastic,  // bfloat16, rounded stochastically
};

// Parameter and gradient have the format `own`. With Storing::stochastic, the indices of all elements in the whole
// tensor have the same upper 32 bits.
template <class Rule, unsigned Set, Format own, Storing storing = Storing::nearest>
void apply_in_blocks(const Job& job, std::int64_t begin, std::int64_t block, std::int64_t n, std::int64_t tiles_ahead) {
  constexpr std::size_t operands = kOperands<Rule>;
  constexpr bool is_split = storing == Storing::split;
  using Own = CodecOf<own>;
  constexpr auto own_size = static_cast<std::int64_t>(size_of(own));
  const auto constants = constants_of<Rule, float, Set>(job);
  const auto factor = static_cast<float>(job.grad_factor);
  std::byte* data[operands];
  std::uint8_t* scales[operands];
  for (std::size_t k = 0; k < operands; ++k) {
    const bool is_state = k >= kFirstState;
    data[k] = job.operands.data()[k].data + (is_used<Set>(k) ? begin * (is_state ? 1 : own_size) : 0);
    scales[k] = is_state && is_used<Set>(k)
                    ? reinterpret_cast<std::uint8_t*>(job.blocks.scales.data()[k - kFirstState]) + block
                    : nullptr;
  }
  std::byte* const low = is_split ? job.operands.data()[kMaster].data + begin * own_size : nullptr;
  StateTile tiles[operands];
  RandomUnits<false> random;
  if constexpr (storing == Storing::stochastic) random.start(job.rounding.key, job.rounding.first + begin);

  [&]<std::size_t... K>(std::index_sequence<K...> /*operands*/) __attribute__((always_inline)) {
    const auto for_each_state = [&](auto&& visit) __attribute__((always_inline)) {
      const auto visit_state = [&]<std::size_t k>(Index<k> operand) __attribute__((always_inline)) {
        if constexpr (k >= kFirstState && is_used<Set>(k)) visit(operand);
      };
      (visit_state(Index<K>{}), ...);
    };
    const auto step_block = [&](std::int64_t at, std::int64_t in_tile) __attribute__((always_inline)) {
      BitVector largest[operands];
#pragma GCC unroll 2
      for (std::int64_t i = 0; i < kBlockLength; i += kUnit) {
        // The compiler keeps each of these arrays in a register.
        alignas(64) float first[operands][kVectorWidth];
        alignas(64) float second[operands][kVectorWidth];
        const auto load = [&]<std::size_t k>(Index<k>) __attribute__((always_inline)) {
          if constexpr (is_used<Set>(k)) {
            VectorPair pair;
            if constexpr (k == kParam && is_split) {
              pair = load_joined(data[k] + (at + i) * own_size, low + (at + i) * own_size);
            } else if constexpr (k < kFirstState) {
              pair = load_pair(Own{}, data[k] + (at + i) * own_size);
            } else {
              constexpr Coding coding = Rule::state_codings[k - kFirstState];
              const auto* codes = reinterpret_cast<const std::uint8_t*>(data[k]) + at + i;
              const auto value = [&](const std::uint8_t* from) __attribute__((always_inline)) {
                return state_value<coding>(load_e4m3(from), tiles[k].decoding[in_tile]);
              };
              pair = {value(codes), value(codes + kVectorWidth)};
            }
            store_vector(Float32{}, as_bytes(first[k]), pair.first);
            store_vector(Float32{}, as_bytes(second[k]), pair.second);
          }
        };
        (load(Index<K>{}), ...);
        apply_to_register<Rule, Set>(constants, factor, first);
        apply_to_register<Rule, Set>(constants, factor, second);
        const VectorPair param{load_vector(Float32{}, as_bytes(first[kParam])),
                               load_vector(Float32{}, as_bytes(second[kParam]))};
        std::byte* const to = data[kParam] + (at + i) * own_size;
        if constexpr (is_split) {
          store_split(to, low + (at + i) * own_size, param);
        } else if constexpr (storing == Storing::stochastic) {
          random.make(kParamStream / 2, at + i);
          store_bytes(to, upper_halves(random.rounded(kParamStream, 0, param.first),
                                       random.rounded(kParamStream, 1, param.second)));
        } else {
          store_pair(Own{}, to, param);
        }
        for_each_state([&]<std::size_t k>(Index<k>) __attribute__((always_inline)) {
          constexpr Coding coding = Rule::state_codings[k - kFirstState];
          const auto keep = [&](const float* values, std::int64_t from, bool is_first) __attribute__((always_inline)) {
            const auto stored = stored_value<coding>(load_vector(Float32{}, as_bytes(values)));
            store_vector(Float32{}, as_bytes(tiles[k].stored + in_tile * kBlockLength + from), stored);
            const auto magnitude = magnitude_of<BitVector>(stored);
            if (is_first) {
              largest[k] = magnitude;
            } else {
              largest[k] = magnitude > largest[k] ? magnitude : largest[k];
            }
          };
          keep(first[k], i, i == 0);
          keep(second[k], i + kVectorWidth, false);
        });
      }
      for_each_state([&]<std::size_t k>(Index<k>)
                         __attribute__((always_inline)) { tiles[k].largest[in_tile] = largest[k]; });
    };
    for (std::int64_t at = 0; at < n; at += kTile<float>) {
      const std::int64_t ahead = at + tiles_ahead * kTile<float>;
      const auto fetch = [&]<std::size_t k>(Index<k>) __attribute__((always_inline)) {
        constexpr std::int64_t size = k < kFirstState ? own_size : 1;
        if constexpr (is_used<Set>(k)) prefetch(data[k] + ahead * size, kTile<float> * size);
      };
      if (tiles_ahead > 0 && ahead + kTile<float> <= n) {
        (fetch(Index<K>{}), ...);
        if constexpr (is_split) prefetch(low + ahead * own_size, kTile<float> * own_size);
      }
      const std::int64_t count = (n - at < kTile<float> ? n - at : kTile<float>) / kBlockLength;
      for_each_state([&]<std::size_t k>(Index<k>) __attribute__((always_inline)) {
        const auto factors = decoding_factor<EightFloats>(load_scales(scales[k] + at / kBlockLength, count));
        std::memcpy(tiles[k].decoding, &factors, sizeof factors);
        for (std::int64_t i = count; i < kBlocksInTile; ++i) tiles[k].largest[i] = BitVector{};
      });
      for (std::int64_t i = 0; i < count; ++i) step_block(at + i * kBlockLength, i);
      for_each_state([&]<std::size_t k>(Index<k>) __attribute__((always_inline)) {
        constexpr std::size_t state = k - kFirstState;
        choose_scales(tiles[k], scales[k] + at / kBlockLength, count);
        make_random(tiles[k], job.rounding.key, state, job.rounding.first + begin + at, count);
      });
      for (std::int64_t i = 0; i < count; ++i)
        for_each_state([&]<std::size_t k>(Index<k>) __attribute__((always_inline)) {
          encode_whole_block<Rule::state_codings[k - kFirstState]>(
              tiles[k], i, reinterpret_cast<std::uint8_t*>(data[k]) + at + i * kBlockLength);
        });
    }
  }(std::make_index_sequence<operands>{});
}

// Whether a rule with these states has a kernel. Three states are rare, and would take more registers than there are.
template <class Rule, unsigned Set>
constexpr bool has_kernel_in_blocks() {
  if constexpr (requires { requires !Rule::takes_dense; }) return false;
  return std::popcount(Set) == 1 || std::popcount(Set) == 2;
}

// Returns the kernel for elements [begin, end) of a job; null if there is none.
template <class Rule, unsigned Set>
ApplyInBlocks find_in_blocks(const Job& job, std::int64_t begin, std::int64_t end) {
  if constexpr (has_kernel_in_blocks<Rule, Set>() && requires { Rule::state_codings; }) {
    const auto all = [&](Format own) {
      return all_operands(job, [&](std::size_t k, const Operand& operand) {
        return operand.format == (k < kFirstState ? own : Format::float8_e4m3fn);
      });
    };
    if (job.master == Master::whole) return nullptr;
    if (job.master == Master::low_bits)
      return all(Format::bfloat16) ? &apply_in_blocks<Rule, Set, Format::bfloat16, Storing::split> : nullptr;
    if (job.rounds(kParam))
      return all(Format::bfloat16) && has_one_upper_half(job, begin, end)
                 ? &apply_in_blocks<Rule, Set, Format::bfloat16, Storing::stochastic>
                 : nullptr;
    if (all(Format::float32)) return &apply_in_blocks<Rule, Set, Format::float32>;
    if (all(Format::bfloat16)) return &apply_in_blocks<Rule, Set, Format::bfloat16>;
  }
  return nullptr;
}

}  // namespace onepass::inline ONEPASS_TARGET

#endif  // ONEPASS_FLOAT_VECTOR
