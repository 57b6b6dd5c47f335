// The kernels that sum what a rule computes of its operands over each tensor (LAMB's norms), before any of them is
// written, and that complete the constants of the step with these sums: the work of one thread. Plain C++, so that the
// tests run the same lines on the CPU.
//
// As in the norm of all gradients, sums are in double. Each thread of a block adds the same elements in every run,
// whatever their strides and alignment, the threads' sums are added in pairs, and so are the blocks' sums. A CPU adds
// in another order.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>
#include <utility>

#include "cuda/kernel.h"
#include "cuda/norm_kernel.h"
#include "cuda/stochastic_kernel.h"

namespace onepass::inline ONEPASS_TARGET {

using cuda::SumWords;

template <class Rule>
struct Sums {
  double values[Rule::sums] = {};
};

template <class TableType>
ONEPASS_INLINE const SumWords& sum_words(const TableType& table, const Row& row) {
  int before = operands_of(row);
  if (row.access == Access::stochastic) before += static_cast<int>(sizeof(StochasticWords) / sizeof(std::uint64_t));
  return *reinterpret_cast<const SumWords*>(table.words + row.pointers + before);
}

// Adds the terms of the i-th elements of all operands. A state that the row does not have is zero.
template <class Rule, class T, int Count, std::size_t... Sum, std::size_t... State>
ONEPASS_INLINE void add_terms(const Stepper<Rule, T>& stepper, const T (&values)[kOperands<Rule>][Count], int i,
                              Sums<Rule>& sums, std::index_sequence<Sum...> /*sums*/,
                              std::index_sequence<State...> /*states*/) {
  const T p = flushed(values[kParam][i]);
  const T g = clamped(stepper.factor * flushed(values[kGrad][i]), stepper.clip_value());
  const T states[] = {flushed(values[kFirstState + State][i])...};
  ((sums.values[Sum] = plus(sums.values[Sum], Rule::template summed<Sum>(stepper.constants, p, g, states[State]...))),
   ...);
}

// The same with all sums and states.
template <class Rule, class T, int Count>
ONEPASS_INLINE void add_terms(const Stepper<Rule, T>& stepper, const T (&values)[kOperands<Rule>][Count], int i,
                              Sums<Rule>& sums) {
  add_terms(stepper, values, i, sums, std::make_index_sequence<Rule::sums>{},
            std::make_index_sequence<Rule::state_names.size()>{});
}

// Sums the share of one thread of the block's chunk of a row that has states in blocks.
template <class Rule, class TableType>
ONEPASS_INLINE Sums<Rule> sum_blocks(const TableType& table, const Row& row, std::uint32_t block,
                                     std::uint32_t thread) {
  const auto stepper = stepper_of<Rule, float>(table, row);
  const auto own = stochastic_stepper_of(table, stepper, 0);
  const auto length = static_cast<std::int64_t>(own.words.row_length);
  Sums<Rule> sums;
  for_each_block(table.header, row, own.words, block, thread,
                 [&](std::int64_t own_row, std::int64_t column, std::int64_t number, int lane) {
#pragma unroll
                   for (int played = 0; played < kPlayed; ++played) {
                     const int count = count_of_lane(length - column, lane + played);
                     if (count == 0) continue;
                     typename StochasticStepper<Rule>::Values values = {};
                     own.load(own_row * length + column + (lane + played) * kOwn, number, count, values);
#pragma unroll
                     for (int i = 0; i < kOwn; ++i)
                       if (i < count) add_terms(stepper, values, i, sums);
                   }
                 });
  return sums;
}

// Sums the share of one thread of the block's chunk of a row, which has no followers.
template <class Rule, class T, class TableType>
ONEPASS_INLINE Sums<Rule> sum_chunk(const TableType& table, std::uint32_t block, std::uint32_t thread) {
  constexpr int width = kWidth<T>;
  const Row row = reinterpret_cast<const Row*>(table.words)[find_row(table, block)];
  if constexpr (sizeof(T) == sizeof(float) && has_codings<Rule>)
    if (row.access == Access::stochastic) return sum_blocks<Rule>(table, row, block, thread);
  const auto stepper = stepper_of<Rule, T>(table, row);
  const Share share(row, table.header.chunk, block, width);
  Sums<Rule> sums;
  const auto add_element = [&](std::int64_t at, const std::uint64_t* layout) {
    std::int64_t offsets[kOperands<Rule> + 1];
    T values[kOperands<Rule>][1] = {};
    stepper.read_element(at, layout, offsets, values);
    add_terms(stepper, values, 0, sums);
  };
  const std::uint64_t* layout = row.has_layout != 0 ? table.words + row.layout : nullptr;
  const bool in_vectors = row.access != Access::elements;
#pragma unroll 1
  for (std::int64_t at = share.begin + std::int64_t{thread} * width; at < share.end; at += cuda::kThreads * width) {
    if (in_vectors && share.end - at >= width) {
      T values[kOperands<Rule>][width] = {};
      stepper.template read_vectors<kRuleOperands<Rule>>(at, values);
      if constexpr (sizeof(T) == sizeof(float))
        if (stepper.has_master()) stepper.join_vector(at, values[kParam]);
#pragma unroll
      for (int i = 0; i < width; ++i) add_terms(stepper, values, i, sums);
    } else {
#pragma unroll 1
      for (int i = 0; i < width && at + i < share.end; ++i) add_element(at + i, layout);
    }
  }
  return sums;
}

// Writes the sums of a block.
template <class Rule, class TableType>
ONEPASS_INLINE void write_sums(const TableType& table, std::uint32_t block, const Sums<Rule>& sums) {
  const Row row = reinterpret_cast<const Row*>(table.words)[find_row(table, block)];
  auto* target = at_address<double>(sum_words(table, row).sums) + std::uint64_t{block - row.first_block} * Rule::sums;
#pragma unroll
  for (std::size_t which = 0; which < Rule::sums; ++which) target[which] = sums.values[which];
}

// Returns one thread's share of a sum of a row: of the sums of its blocks.
template <class Rule, class TableType>
ONEPASS_INLINE double add_blocks(const TableType& table, std::uint32_t number, std::size_t which,
                                 std::uint32_t thread) {
  const auto* rows = reinterpret_cast<const Row*>(table.words);
  const std::uint32_t past = number + 1 < table.header.rows ? rows[number + 1].first_block : table.header.blocks;
  const std::uint32_t blocks = past - rows[number].first_block;
  const auto* sums = at_address<const double>(sum_words(table, rows[number]).sums);
  double sum = 0.0;
  for (std::uint32_t block = thread; block < blocks; block += cuda::kThreads)
    sum += sums[std::uint64_t{block} * Rule::sums + which];
  return sum;
}

// Writes the sums of a row that is a shard.
template <class Rule, class TableType>
ONEPASS_INLINE void write_totals(const TableType& table, std::uint32_t number, const Sums<Rule>& sums) {
  const Row row = reinterpret_cast<const Row*>(table.words)[number];
  auto* target = at_address<double>(sum_words(table, row).totals);
#pragma unroll
  for (std::size_t which = 0; which < Rule::sums; ++which) target[which] = sums.values[which];
}

// Completes the constants of a row, and writes the rule's scalars after this step. One thread does this.
template <class Rule, class T, class TableType>
ONEPASS_INLINE void complete_row(const TableType& table, std::uint32_t number, const Sums<Rule>& sums) {
  if (is_skipped(table.header)) return;
  const Row row = reinterpret_cast<const Row*>(table.words)[number];
  const auto elements = static_cast<double>(row.length);
  auto& constants = *at_address<typename Rule::template Constants<T>>(
      table.header.workspace + std::uint64_t{row.constants} * sizeof(std::uint64_t));
  if constexpr (std::is_void_v<decltype(Rule::use_sums(constants, sums.values, elements))>) {
    Rule::use_sums(constants, sums.values, elements);
  } else {
    const auto scalars = Rule::use_sums(constants, sums.values, elements);
    const SumWords& words = sum_words(table, row);
    write_numbers(words.scalars, words.formats, scalars);
  }
}

}  // namespace onepass::inline ONEPASS_TARGET
