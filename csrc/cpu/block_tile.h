// Encodes tiles of states that are stored in blocks (formats/microscaling.h), a register at a time.
#pragma once

#include "cpu/float_vector.h"

#ifdef ONEPASS_FLOAT_VECTOR

#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "cpu/convert.h"
#include "formats/microscaling.h"
#include "target.h"

namespace onepass::inline ONEPASS_TARGET {

inline constexpr std::int64_t kBlocksInTile = kTile<float> / kBlockLength;
static_assert(kBlocksInTile == 8);
static_assert(kCodeShift == 20);  // of store_codes
inline constexpr std::int64_t kParts = kBlockLength / kVectorWidth;

// A tile of a state.
struct StateTile {
  alignas(64) float stored[kTile<float>];
  alignas(64) BitVector largest[kBlocksInTile];  // magnitudes of each block, in a vector
  alignas(32) float decoding[kBlocksInTile];     // factors of each block
  alignas(32) float encoding[kBlocksInTile];
  BlockRandom random[kBlocksInTile];
};

// Copies the scales of `count` blocks, at most a tile's.
ONEPASS_INLINE void copy_scales(const void* from, void* to, std::int64_t count) {
  if (count == kBlocksInTile) {
    std::memcpy(to, from, kBlocksInTile);
  } else {
    std::memcpy(to, from, static_cast<std::size_t>(count));
  }
}

ONEPASS_INLINE EightBits load_scales(const std::uint8_t* from, std::int64_t count) {
  std::uint8_t bytes[kBlocksInTile] = {};
  copy_scales(from, bytes, count);
  return std::bit_cast<EightBits>(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(bytes))));
}

// Determines and writes the scales of `count` blocks, and the factors to encode. The stored values of blocks that are
// NaN become zeros.
ONEPASS_INLINE void choose_scales(StateTile& tile, std::uint8_t* to, std::int64_t count) {
  const EightBits scales = scale_for(largest_elements(tile.largest));
  const auto factors = encoding_factor<EightFloats>(scales);
  std::memcpy(tile.encoding, &factors, sizeof factors);
  using EightBytes [[gnu::vector_size(8)]] = std::uint8_t;
  const auto bytes = __builtin_convertvector(scales, EightBytes);
  copy_scales(&bytes, to, count);
  if (_mm256_movemask_epi8(std::bit_cast<__m256i>(scales == kNanScale)) == 0) return;
  for (std::int64_t i = 0; i < count; ++i)
    if (scales[i] == kNanScale) std::memset(tile.stored + i * kBlockLength, 0, kBlockLength * sizeof(float));
}

// Makes the random bits of the first `count` blocks of a tile of a state, which begins at this index in the whole
// tensor.
ONEPASS_INLINE void make_random(StateTile& tile, std::uint64_t key, std::size_t state, std::int64_t index,
                                std::int64_t count) {
  for (std::int64_t i = 0; i < count; ++i) tile.random[i] = block_random(key, state, index + i * kBlockLength);
}

// Encodes block `i` of a tile.
template <Coding coding>
ONEPASS_INLINE void encode_whole_block(const StateTile& tile, std::int64_t i, std::uint8_t* codes) {
  BitVector encoded[kParts];
#pragma GCC unroll 4
  for (std::int64_t part = 0; part < kParts; ++part) {
    const auto stored = load_vector(Float32{}, as_bytes(tile.stored + i * kBlockLength + part * kVectorWidth));
    const BitVector places = numbers_from(static_cast<std::uint32_t>(part * kVectorWidth));
    const BitVector random = tile.random[i].bits(hash_of_place(places));
    encoded[part] = encode_state<coding>(stored, tile.encoding[i], random);
  }
  store_codes(encoded, codes);
}

// Encodes `count` whole blocks of a state, at most a tile's. `index` is the first element's in the whole tensor.
template <Coding coding>
ONEPASS_INLINE void encode_whole_blocks(const float* values, std::uint64_t key, std::size_t state, std::int64_t index,
                                        std::uint8_t* codes, std::uint8_t* scales, std::int64_t count) {
  StateTile tile;
  for (BitVector& largest : tile.largest) largest = BitVector{};
  for (std::int64_t i = 0; i < count; ++i)
#pragma GCC unroll 4
    for (std::int64_t at = i * kBlockLength; at < (i + 1) * kBlockLength; at += kVectorWidth) {
      const auto stored = stored_value<coding>(load_vector(Float32{}, as_bytes(values + at)));
      store_vector(Float32{}, as_bytes(tile.stored + at), stored);
      const auto magnitude = magnitude_of<BitVector>(stored);
      tile.largest[i] = magnitude > tile.largest[i] ? magnitude : tile.largest[i];
    }
  choose_scales(tile, scales, count);
  make_random(tile, key, state, index, count);
  for (std::int64_t i = 0; i < count; ++i) encode_whole_block<coding>(tile, i, codes + i * kBlockLength);
}

}  // namespace onepass::inline ONEPASS_TARGET

#endif  // ONEPASS_FLOAT_VECTOR
