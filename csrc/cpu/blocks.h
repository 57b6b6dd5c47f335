// Decodes and encodes tiles of states that are stored in blocks (formats/microscaling.h).
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "cpu/apply.h"
#include "cpu/block_tile.h"
#include "cpu/convert.h"
#include "cpu/float_vector.h"
#include "cpu/runs.h"
#include "formats/microscaling.h"
#include "job.h"
#include "target.h"

namespace onepass::inline ONEPASS_TARGET {

inline bool is_in_blocks(const Job& job, std::size_t operand) {
  return job.operands.data()[operand].format == Format::float8_e4m3fn;
}

// Returns the position, at most a tile further, up to which [at, end) is whole blocks.
template <class T>
std::int64_t end_of_blocks(const Job& job, std::int64_t at, std::int64_t end) {
  return end - at <= kTile<T> ? end : job.blocks.block_begin(at + kTile<T>);
}

// Calls visit(codes, scales, index, tile, count) for the part of elements [begin, begin + n) of a state that is in one
// row, for each row: its codes and scales, the first element's index in the whole tensor, its elements in the tile, and
// their number.
template <class T, class Visit>
ONEPASS_INLINE void for_each_row_of_blocks(const Job& job, std::size_t operand, std::int64_t begin, std::int64_t n,
                                           T* tile, Visit&& visit) {
  const Blocks& blocks = job.blocks;
  auto* const codes = reinterpret_cast<std::uint8_t*>(job.operands.data()[operand].data);
  auto* const scales = reinterpret_cast<std::uint8_t*>(blocks.scales.data()[operand - kFirstState]);
  const std::int64_t length = blocks.row_length;
  const std::int64_t scales_in_row = (length + kBlockLength - 1) / kBlockLength;
  std::int64_t column = begin % length;
  for (std::int64_t row = begin / length; n > 0; ++row) {
    const std::int64_t own_row = job.rows != nullptr ? row_number(*job.rows, row) : row;
    const std::int64_t count = length - column < n ? length - column : n;
    const std::int64_t at = own_row * length + column;
    visit(codes + at, scales + own_row * scales_in_row + column / kBlockLength, job.rounding.first + at, tile, count);
    tile += count;
    n -= count;
    column = 0;
  }
}

// Decodes `count` elements of a block.
template <Coding coding, class T>
ONEPASS_INLINE void decode_block(const std::uint8_t* codes, float factor, T* tile, int count) {
  int i = 0;
#ifdef ONEPASS_FLOAT_VECTOR
  if constexpr (std::is_same_v<T, float>)
    for (; i + kVectorWidth <= count; i += kVectorWidth)
      store_vector(Float32{}, as_bytes(tile + i), state_value<coding>(load_e4m3(codes + i), factor));
#endif
  for (; i < count; ++i) tile[i] = static_cast<T>(state_value<coding>(decode_e4m3(codes[i]), factor));
}

// Encodes `count` elements of a block, and its scale.
template <Coding coding, class T>
ONEPASS_INLINE void encode_block(const T* tile, const BlockRandom& random, std::uint8_t* codes, std::uint8_t* scale,
                                 int count) {
  alignas(64) float stored[kBlockLength];
  std::uint32_t largest = 0;
  for (int i = 0; i < count; ++i) {
    stored[i] = stored_value<coding>(static_cast<float>(tile[i]));
    const auto magnitude = magnitude_of<std::uint32_t>(stored[i]);
    largest = magnitude > largest ? magnitude : largest;
  }
  const std::uint32_t code = scale_for(largest);
  const auto factor = encoding_factor<float>(code);
  *scale = static_cast<std::uint8_t>(code);
  for (int i = 0; i < count; ++i) {
    codes[i] =
        code_of(encode_state<coding>(stored[i], factor, random.bits(hash_of_place(static_cast<std::uint32_t>(i)))));
    if (code == kNanScale) codes[i] = 0;
  }
}

template <Coding coding, class T>
[[gnu::noinline]] void decode_blocks_of(const Job& job, std::size_t operand, std::int64_t begin, std::int64_t n,
                                        T* tile) {
  for_each_row_of_blocks(
      job, operand, begin, n, tile,
      [](const std::uint8_t* codes, const std::uint8_t* scales, std::int64_t, T* to, std::int64_t count)
          __attribute__((always_inline)) {
            const auto decode = [&](std::int64_t at, int length) __attribute__((always_inline)) {
              decode_block<coding>(codes + at, decoding_factor<float>(std::uint32_t{scales[at / kBlockLength]}),
                                   to + at, length);
            };
            const std::int64_t whole = count / kBlockLength * kBlockLength;
            for (std::int64_t at = 0; at < whole; at += kBlockLength) decode(at, kBlockLength);
            if (whole < count) decode(whole, static_cast<int>(count - whole));
          });
}

template <Coding coding, class T>
[[gnu::noinline]] void encode_blocks_of(const Job& job, std::size_t operand, std::int64_t begin, std::int64_t n,
                                        const T* tile) {
  const std::uint64_t key = job.rounding.key;
  const std::size_t state = operand - kFirstState;
  for_each_row_of_blocks(
      job, operand, begin, n, tile,
      [&](std::uint8_t* codes, std::uint8_t* scales, std::int64_t index, const T* from, std::int64_t count)
          __attribute__((always_inline)) {
            std::int64_t at = 0;
#ifdef ONEPASS_FLOAT_VECTOR
            if constexpr (std::is_same_v<T, float>)
              if (const std::int64_t blocks = count / kBlockLength; blocks > 0) {
                encode_whole_blocks<coding>(from, key, state, index, codes, scales, blocks);
                at = blocks * kBlockLength;
              }
#endif
            for (; at < count; at += kBlockLength) {
              const auto length = static_cast<int>(count - at < kBlockLength ? count - at : kBlockLength);
              encode_block<coding>(from + at, block_random(key, state, index + at), codes + at,
                                   scales + at / kBlockLength, length);
            }
          });
}

// Calls visit(coding), a compile-time constant.
template <class Visit>
ONEPASS_INLINE void with_coding(Coding coding, Visit&& visit) {
  switch (coding) {
    case Coding::squares:
      return visit(std::integral_constant<Coding, Coding::squares>{});
    case Coding::magnitudes:
      return visit(std::integral_constant<Coding, Coding::magnitudes>{});
    default:
      return visit(std::integral_constant<Coding, Coding::signed_values>{});
  }
}

// Decode and encode elements [begin, begin + n), whole blocks, of a state.
template <class T>
void decode_blocks(const Job& job, std::size_t operand, std::int64_t begin, std::int64_t n, T* tile) {
  with_coding(job.blocks.codings.data()[operand - kFirstState],
              [&](auto coding) { decode_blocks_of<decltype(coding)::value>(job, operand, begin, n, tile); });
}

template <class T>
void encode_blocks(const Job& job, std::size_t operand, std::int64_t begin, std::int64_t n, const T* tile) {
  with_coding(job.blocks.codings.data()[operand - kFirstState],
              [&](auto coding) { encode_blocks_of<decltype(coding)::value>(job, operand, begin, n, tile); });
}

}  // namespace onepass::inline ONEPASS_TARGET
