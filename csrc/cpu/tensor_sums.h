// The sums over a whole tensor that the update of some rules depends on (LAMB's trust ratio), of what a rule computes
// of its operands before any of them is written.
//
// As in the measure phase, sums are in double, over blocks of a fixed size, which are added in order. So no bit depends
// on threads or instruction sets.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>
#include <utility>

#include "cpu/apply.h"
#include "cpu/blocks.h"
#include "cpu/convert.h"
#include "cpu/driver.h"
#include "cpu/kernels.h"
#include "cpu/master.h"
#include "cpu/sums.h"
#include "cpu/tile.h"
#include "job.h"
#include "target.h"

namespace onepass::inline ONEPASS_TARGET {

// Adds what the rule sums of n elements of plain arrays to the lanes.
template <class Rule, class T, std::size_t... Sum, std::size_t... State>
void add_sums(const ConstantsOf<Rule, T>& constants, T factor, const T* const* arrays, std::int64_t n,
              LaneSums<double, Rule::sums>& lanes, std::index_sequence<Sum...> /*sums*/,
              std::index_sequence<State...> /*states*/) {
  const T* const param = arrays[kParam];
  const T* const grad = arrays[kGrad];
  const auto value = [&]<std::size_t which>(std::int64_t i) __attribute__((always_inline)) {
    return Rule::template summed<which>(constants, param[i], factor * grad[i], arrays[kFirstState + State][i]...);
  };
  lanes.add(
      n, [](std::int64_t) {},
      [&](std::int64_t i) __attribute__((always_inline)) { return value.template operator()<Sum>(i); }...);
}

// Writes the rule's sums over elements [begin, end) of a job. States that the step does not use are zero.
template <class Rule, class T>
void sum_up(const Job& job, std::int64_t begin, std::int64_t end, double* sums) {
  alignas(64) T tiles[kOperands<Rule>][kTile<T>];
  const T* arrays[kOperands<Rule>];
  const auto constants = *static_cast<const ConstantsOf<Rule, T>*>(job.constants);
  const bool packed = job.layout == nullptr;
  const bool clamps = job.clip_value != kNoLimit;
  for (std::size_t k = 0; k < kOperands<Rule>; ++k)
    if (job.operands[k].data == nullptr)
      for (T& value : tiles[k]) value = T(0);
  LaneSums<double, Rule::sums> lanes;
  const bool blocks = job.blocks.row_length != 0;
  std::int64_t n = 0;
  for (std::int64_t at = begin; at < end; at += n) {
    n = end - at < kTile<T> ? end - at : kTile<T>;
    if (blocks) n = end_of_blocks<T>(job, at, end) - at;
    for (std::size_t k = 0; k < kOperands<Rule>; ++k) {
      const Operand& operand = job.operands[k];
      arrays[k] = tiles[k];
      if (operand.data == nullptr) continue;
      if (is_in_blocks(job, k)) {
        decode_blocks(job, k, at, n, tiles[k]);
      } else if (packed && is_plain_array<T>(operand) && !(clamps && k == kGrad)) {
        arrays[k] = reinterpret_cast<const T*>(element(operand, at));
      } else {
        decode(job, k, at, n, tiles[k]);
      }
    }
    if constexpr (std::is_same_v<T, float>)
      if (job.master != Master::none) read_master(job, at, n, tiles[kParam]);
    if (clamps) scale_and_clamp(static_cast<T>(job.grad_factor), job.clip_value_as<T>(), tiles[kGrad], n);
    add_sums<Rule, T>(constants, clamps ? T(1) : static_cast<T>(job.grad_factor), arrays, n, lanes,
                      std::make_index_sequence<Rule::sums>{}, std::make_index_sequence<Rule::state_names.size()>{});
  }
  for (std::size_t s = 0; s < Rule::sums; ++s) sums[s] = 0.0;
  lanes.add_to(sums);
}

// Returns the kernel of a rule; null if its update depends on no sums.
template <class Rule, class T>
constexpr SumsKernel sums_kernel() {
  if constexpr (requires { Rule::sums; }) {
    return &sum_up<Rule, T>;
  } else {
    return nullptr;
  }
}

}  // namespace onepass::inline ONEPASS_TARGET
