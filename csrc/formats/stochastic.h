// Stochastic rounding: up with a probability that is the distance from the lower number. So a sum of many small changes
// is kept on average, where rounding to nearest would lose each of them.
//
// The random bits are a function of the seed, the step, the parameter, and the element's place in the whole tensor: the
// same for every instruction set, thread count and GPU, in a resumed run, and for shards along dimension 0.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>

#include "formats/bfloat16.h"
#include "formats/float16.h"
#include "rules/registry.h"
#include "target.h"

namespace onepass::inline ONEPASS_TARGET {

// Returns a hash (SplitMix64).
ONEPASS_INLINE std::uint64_t hash_of(std::uint64_t x) {
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9U;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebU;
  return x ^ (x >> 31);
}

// Returns the key of the random bits of a parameter in a step: a hash of the seed, the step, and the parameter's number
// among all parameters of the optimizer.
ONEPASS_INLINE std::uint64_t random_key(std::uint64_t seed, std::uint64_t step, std::uint64_t param) {
  std::uint64_t key = 0;
  const std::uint64_t parts[] = {seed, step, param};
  for (const std::uint64_t part : parts) {
    key = hash_of(key + part + 0x9e3779b97f4a7c15U);
  }
  return key;
}

inline constexpr std::uint32_t kIndexFactor = 0x9e3779b1U;

// Returns 32 random bits for each element. `Bits` is 32 bits, or a vector of them. `product` is index * kIndexFactor +
// key. The other multipliers and shifts are those of a hash by C. Wellons (hash-prospector) in which each bit of the
// argument changes half of the bits.
template <class Bits>
ONEPASS_INLINE Bits random_bits(Bits product) {
  Bits x = product ^ (product >> 16);
  x *= 0x21f0aaadU;
  x ^= x >> 15;
  x *= 0xd35a2d97U;
  return x ^ (x >> 16);
}

// Returns a hash of an element's place in its block.
template <class Bits>
ONEPASS_INLINE Bits hash_of_place(Bits place) {
  return random_bits(Bits((place + 1U) * kIndexFactor));
}

// The random bits of a block of elements: 32 for each, a linear function of the hash of its place. It takes two
// operations, where a hash for each element takes eight. The upper 20 bits of any two elements are independent, because
// no two hashes of places differ by a multiple of 2^13. So rounding errors are not correlated.
struct BlockRandom {
  std::uint32_t factor, addend;

  template <class Bits>
  ONEPASS_INLINE Bits bits(Bits hash) const {
    return hash * factor + addend;
  }
};

// Returns the random bits of a block of a state. `index` is that of the block's first element in the whole tensor.
ONEPASS_INLINE BlockRandom block_random(std::uint64_t key, std::size_t state, std::int64_t index) {
  const std::uint64_t count = static_cast<std::uint64_t>(index) * kMaxStates + state + 1;
  const std::uint64_t hash = hash_of(key + count * 0x9e3779b97f4a7c15U);
  return {.factor = static_cast<std::uint32_t>(hash), .addend = static_cast<std::uint32_t>(hash >> 32)};
}

// The stream of random bits of a parameter. Each state of 16 bits has that of its number.
inline constexpr std::size_t kParamStream = kMaxStates;

// Returns the product for an element, of which each following element's is kIndexFactor more, unless `index`, its index
// in the whole tensor, has other upper 32 bits. A state with an even number shares the random bits with the next.
ONEPASS_INLINE std::uint32_t first_product(std::uint64_t key, std::size_t stream, std::int64_t index) {
  const auto at = static_cast<std::uint64_t>(index);
  const std::uint64_t mixed =
      (key + (stream / 2 + (at >> 32) * kMaxStates) * 0x9e3779b97f4a7c15U) * 0xbf58476d1ce4e5b9U;
  return static_cast<std::uint32_t>(at) * kIndexFactor + static_cast<std::uint32_t>(mixed >> 32);
}

// Returns the 16 random bits of one of the two states that share 32.
ONEPASS_INLINE std::uint32_t sixteen_of(bool second, std::uint32_t random) {
  return second ? random & 0xffffU : random >> 16;
}

// Return a float32 number, rounded stochastically with 16 random bits to a number that the format has. NaN and infinity
// stay as they are.
ONEPASS_INLINE float rounded(BFloat16, float value, std::uint32_t random) {
  const auto bits = std::bit_cast<std::uint32_t>(value);
  return std::bit_cast<float>(value != value ? bits : (bits + random) & 0xffff0000U);
}

ONEPASS_INLINE float rounded(Float16, float value, std::uint32_t random) {
  const auto bits = std::bit_cast<std::uint32_t>(value);
  const std::uint32_t magnitude = bits & 0x7fffffffU;
  // Below 2^-14 float16 has the multiples of 2^-24. With 2^-14 added, they differ in the same bit as the numbers above.
  const bool small = magnitude < (113U << 23);
  const auto raised = std::bit_cast<std::uint32_t>(std::bit_cast<float>(small ? magnitude : 0U) + 0x1p-14F);
  const std::uint32_t sum = ((small ? raised : magnitude) + (random >> 3)) & ~0x1fffU;
  const auto lowered = std::bit_cast<std::uint32_t>(std::bit_cast<float>(small ? sum : 113U << 23) - 0x1p-14F);
  const std::uint32_t result = small ? lowered : magnitude >= 0x7f800000U ? magnitude : sum;
  return std::bit_cast<float>(result | (bits & 0x80000000U));
}

}  // namespace onepass::inline ONEPASS_TARGET
