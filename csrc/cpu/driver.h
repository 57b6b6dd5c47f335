// The element-wise driver: one pass over a range of a tensor, by the first of these that applies:
//
// - All operands are packed arrays of the arithmetic type: the rule runs over them in place.
// - All are packed, and the states are in blocks (in_blocks.h): a tile of blocks is decoded and stepped in registers,
//   and then encoded.
// - All are packed, in one of the usual combinations of formats (in_registers.h): a kernel for each combination loads a
//   register of every operand, converts it, applies the rule, converts and stores.
// - Otherwise operands are decoded into tiles that stay in the L1 cache, and encoded again after the rule.
//
// So a rule reads and writes only plain arrays of the arithmetic type.
//
// With a sparse gradient the range counts the elements of the touched rows, one row after the other. Long rows are used
// in place, short ones are collected in the tile. The gradient's entries for a row are added up while they are decoded.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "cpu/apply.h"
#include "cpu/blocks.h"
#include "cpu/convert.h"
#include "cpu/in_blocks.h"
#include "cpu/in_registers.h"
#include "cpu/master.h"
#include "cpu/rows.h"
#include "cpu/runs.h"
#include "cpu/stochastic.h"
#include "cpu/tile.h"
#include "cpu/tuning.h"
#include "job.h"
#include "rules/math.h"
#include "target.h"

namespace onepass::inline ONEPASS_TARGET {

// Updates elements [begin, begin + n) of a job's followers. `param` holds these elements of the parameter
// (followers.h).
template <class T>
void follow(const Job& job, std::int64_t begin, std::int64_t n, T* param);

// Clamps n elements of a gradient, after multiplying them by `factor`. NaN stays NaN.
template <class T>
void scale_and_clamp(T factor, T limit, T* grad, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) grad[i] = clamped(factor * grad[i], limit);
}

constexpr bool is_follower(std::size_t operand) { return operand >= kFirstFollower && operand < kMaster; }

inline bool has_followers(const Job& job) {
  const Operand* operands = job.operands.data();
  for (std::size_t k = kFirstFollower; k < kMaster; ++k)
    if (operands[k].data != nullptr) return true;
  return false;
}

// Steps elements [begin, end) of packed operands in place.
inline void run_packed(Apply rule, const Job& job, std::int64_t begin, std::int64_t end, const Tuning& tuning) {
  std::byte* data[kFirstFollower] = {};
  for (std::size_t k = 0; k < kFirstFollower; ++k)
    if (job.operands[k].data != nullptr) data[k] = element(job.operands[k], begin);
  rule(job, data, end - begin, tuning.bytes_ahead);
}

// Overwrites n elements of the gradient with zeros.
inline void write_zeros(const Job& job, std::int64_t begin, std::int64_t n) {
  const Operand& grad = job.operands.data()[kGrad];
  const auto size = static_cast<std::int64_t>(size_of(grad.format));
  for_each_run(job.rows, job.layout, kGrad, begin, n,
               [&](std::int64_t offset, std::int64_t stride, std::int64_t count) {
                 if (stride == 1) {
                   std::memset(grad.data + offset * size, 0, static_cast<std::size_t>(count * size));
                 } else {
                   for (std::int64_t i = 0; i < count; ++i)
                     std::memset(grad.data + (offset + i * stride) * size, 0, static_cast<std::size_t>(size));
                 }
               });
}

// Whether a job does nothing but the rule's update, of the parameter or of its master.
inline bool is_bare(const Job& job) { return job.clip_value == kNoLimit && !job.zeroes_grad && !has_followers(job); }

// Steps elements [begin, end) of operands in every format and layout, through tiles.
template <class T>
void run_in_tiles(Apply rule, const Job& job, std::int64_t begin, std::int64_t end, const Tuning& tuning) {
  alignas(64) T tiles[kFirstFollower][kTile<T>];
  bool in_place[kFirstFollower];
  const bool packed = job.rows == nullptr && job.layout == nullptr;
  const bool long_rows = job.rows != nullptr && job.rows->length >= kLongRow;
  for (std::size_t k = 0; k < kFirstFollower; ++k) {
    const bool is_one_run = packed || (long_rows && k != kGrad) || (job.layout != nullptr && is_packed(*job.layout, k));
    in_place[k] = is_one_run && is_plain_array<T>(job.operands[k]);
  }
  const bool clamps = job.clip_value != kNoLimit;
  Job clamped;  // the job of tiles whose gradient is scaled already
  if (clamps) {
    in_place[kGrad] = false;  // the gradient itself is not changed
    clamped = job;
    clamped.grad_factor = 1.0;
  }
  const bool followed = has_followers(job);
  const bool blocks = job.blocks.row_length != 0;
  const std::int64_t ahead = packed ? tuning.tiles_ahead * kTile<T> : 0;

  std::int64_t n = 0;
  for (std::int64_t at = begin; at < end; at += n) {
    n = end - at < kTile<T> ? end - at : kTile<T>;
    if (blocks) n = end_of_blocks<T>(job, at, end) - at;
    std::int64_t offset = at;  // of the first element in operands that are used in place
    if (long_rows) {
      const std::int64_t column = at % job.rows->length;
      offset = row_number(*job.rows, at / job.rows->length) * job.rows->length + column;
      if (job.rows->length - column < n) n = job.rows->length - column;
    }
    if (ahead > 0 && at + ahead + kTile<T> <= end)
      for (std::size_t k = 0; k < kMaxOperands; ++k)
        if (const Operand& operand = job.operands[k]; operand.data != nullptr && !is_follower(k))
          prefetch(element(operand, at + ahead), kTile<T> * static_cast<std::int64_t>(size_of(operand.format)));
    std::byte* data[kFirstFollower] = {};
    for (std::size_t k = 0; k < kFirstFollower; ++k) {
      if (job.operands[k].data == nullptr) continue;
      data[k] = in_place[k] ? element(job.operands[k], offset) : as_bytes(tiles[k]);
      if (is_in_blocks(job, k)) {
        decode_blocks(job, k, at, n, tiles[k]);
      } else if (!in_place[k]) {
        decode(job, k, at, n, tiles[k]);
      }
    }
    const bool has_master = std::is_same_v<T, float> && job.master != Master::none;
    if constexpr (std::is_same_v<T, float>)
      if (has_master) read_master(job, at, n, tiles[kParam]);
    if (clamps) scale_and_clamp(static_cast<T>(job.grad_factor), job.clip_value_as<T>(), tiles[kGrad], n);
    rule(clamps ? clamped : job, data, n, 0);
    if (job.rounding.stochastic)
      for (std::size_t k = 0; k < kFirstFollower; ++k)
        if (job.rounds(k)) round_stochastically(job, k, at, n, tiles[k]);
    if (followed) follow(job, at, n, reinterpret_cast<T*>(data[kParam]));
    for (std::size_t k = 0; k < kFirstFollower; ++k)
      if (is_in_blocks(job, k)) {
        encode_blocks(job, k, at, n, tiles[k]);
      } else if (job.operands[k].data != nullptr && k != kGrad && !in_place[k] && !(has_master && k == kParam)) {
        encode(job, k, at, n, tiles[k]);
      }
    if constexpr (std::is_same_v<T, float>)
      if (has_master) write_master(job, at, n, tiles[kParam]);
    if (job.zeroes_grad) write_zeros(job, at, n);
  }
}

#ifdef ONEPASS_FLOAT_VECTOR
// Steps elements [begin, end) of a packed job whose states are in blocks. The shorter blocks at the end of rows go
// through tiles.
inline void run_in_blocks(ApplyInBlocks in_blocks, Apply in_arrays, const Job& job, std::int64_t begin,
                          std::int64_t end, const Tuning& tuning) {
  const std::int64_t length = job.blocks.row_length;
  const std::int64_t blocks_in_row = (length + kBlockLength - 1) / kBlockLength;
  for (std::int64_t at = begin; at < end;) {
    const std::int64_t row = at / length;
    const std::int64_t column = at % length;
    const std::int64_t row_end = (row + 1) * length;
    const std::int64_t past = row_end < end ? row_end : end;
    const std::int64_t whole = (past - at) / kBlockLength * kBlockLength;
    if (whole > 0) in_blocks(job, at, row * blocks_in_row + column / kBlockLength, whole, tuning.tiles_ahead);
    if (at + whole < past) run_in_tiles<float>(in_arrays, job, at + whole, past, tuning);
    at = past;
  }
}
#endif

template <class T>
bool all_plain_arrays(const Job& job) {
  return all_operands(job, [](std::size_t, const Operand& operand) { return is_plain_array<T>(operand); });
}

// Steps elements [begin, end) of a job that has this set of the rule's states. Masked updates go through tiles, unless
// all operands are plain arrays.
template <class Rule, class T, unsigned Set>
void run_with(const Job& job, std::int64_t begin, std::int64_t end, const Tuning& tuning) {
  constexpr Apply in_arrays = &apply_to_arrays<Rule, T, Set>;
  if (job.rows == nullptr && job.layout == nullptr && is_bare(job)) {
    const bool has_master = job.master != Master::none;
    if (!has_master && all_plain_arrays<T>(job)) return run_packed(in_arrays, job, begin, end, tuning);
#ifdef ONEPASS_FLOAT_VECTOR
    if constexpr (std::is_same_v<T, float> && (Set & kMasked) == 0) {
      const bool rounds = job.rounding.stochastic;
      // Rows that are shorter than a block are faster in tiles, which have many rows.
      const bool has_whole_blocks = job.blocks.row_length >= kBlockLength;
      if (const ApplyInBlocks in_blocks = has_whole_blocks ? find_in_blocks<Rule, Set>(job, begin, end) : nullptr)
        return run_in_blocks(in_blocks, in_arrays, job, begin, end, tuning);
      if (const Apply in_registers = has_master ? nullptr : find_in_registers<Rule, Set>(job, begin, end)) {
        const std::int64_t rest = (end - begin) % kUnit;
        run_packed(in_registers, job, begin, end - rest, tuning);
        if (rest > 0 && rounds) run_in_tiles<T>(in_arrays, job, end - rest, end, tuning);
        if (rest > 0 && !rounds) apply_to_rest(in_registers, job, end - rest, rest);
        return;
      }
    }
#endif
  }
  run_in_tiles<T>(in_arrays, job, begin, end, tuning);
}

// A kernel: steps elements [begin, end) of a job. The job's states must be one of the rule's `state_sets`.
template <class Rule, class T>
void run(const Job& job, std::int64_t begin, std::int64_t end, const Tuning& tuning) {
  unsigned held = 0;
  for (std::size_t k = 0; k < Rule::state_names.size(); ++k)
    if (job.operands[kFirstState + k].data != nullptr) held |= 1U << k;
  const bool masked = is_masked<Rule, T>(job);
  [&]<std::size_t... I>(std::index_sequence<I...> /*sets*/) {
    const auto run_set = [&]<unsigned Set>() {
      if constexpr (requires(const ConstantsOf<Rule, T>& constants) { constants.caution; })
        if (masked) return run_with<Rule, T, Set | kMasked>(job, begin, end, tuning);
      run_with<Rule, T, Set>(job, begin, end, tuning);
    };
    ((held == Rule::state_sets[I] ? run_set.template operator()<Rule::state_sets[I]>() : void()), ...);
  }(std::make_index_sequence<Rule::state_sets.size()>{});
}

}  // namespace onepass::inline ONEPASS_TARGET
