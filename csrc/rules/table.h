// Rules for the bindings and the tests: names, and functions that compute the constants of a step. No kernels.
#pragma once

#include <array>
#include <cstddef>
#include <span>
#include <string_view>

#include "rules/registry.h"

namespace onepass {

// Memory for the constants of one step.
struct ConstantsBuffer {
  alignas(64) std::byte bytes[kMaxConstantBytes];
};

struct RuleInfo {
  const char* name;
  // Keys of a group: "lr", "betas[0]", ... One that ends in "?" may be None or missing, one in "!" is true or false.
  std::span<const char* const> hyper_names;
  std::span<const char* const> state_names;   // in the order of the operands
  std::span<const Coding> state_codings;      // of each state in 8 bits; empty: they are not stored in 8 bits
  std::span<const char* const> scalar_names;  // of what is kept for each parameter beside its step
  bool counts_steps;                          // whether each parameter has a counter `step`
  std::array<std::size_t, 2> constants_size;  // bytes of the constants of a step, in float32 and in float64

  // Returns the set of states that a step with these hyperparameters (in the order of hyper_names) reads and writes.
  unsigned (*states_used)(const double* hyper);

  // Whether a step with these hyperparameters is defined for the rows that a sparse gradient touches, and whether it is
  // defined for a dense gradient.
  bool (*takes_sparse)(const double* hyper);
  bool takes_dense;

  // Writes the constants of one step, at most kMaxConstantBytes, for arithmetic in float32 or, if wide, float64.
  // `step` counts from 1. For a rule that does not count steps it is 1 while the states are new, else 2. `scalars` are
  // the values after the last step.
  void (*prepare)(const double* hyper, double step, const double* scalars, bool wide, void* constants);

  // How many sums over the whole tensor the update depends on: of arrays that the rule computes of its operands
  // (`summed`). `takes_sums` returns whether a step with these hyperparameters has them. `use_sums` completes constants
  // that `prepare` wrote, for a tensor of so many elements, and writes the values of the scalars after this step, if
  // the rule has any and `sums_set_scalars`. `sums_only_for_scalars`: it does not change the constants, so the update
  // need not wait for the sums.
  std::size_t sums;
  bool sums_set_scalars;
  bool sums_only_for_scalars;
  bool (*takes_sums)(const double* hyper);
  void (*use_sums)(bool wide, const double* sums, double elements, void* constants, double* scalars);

  // Returns the formula of the first divisor of these constants that is zero; null if there is none.
  const char* (*zero_divisor)(const double* hyper, double step, const double* scalars);

  // Replaces the scalars before this step by those after it.
  void (*advance)(const double* hyper, double step, double* scalars);
};

const RuleInfo& info_of(RuleId rule);

// Adafactor and CAME have a driver of their own (cpu/factored.h). They do not use all their states at once: those of
// matrices differ from those of vectors.
const RuleInfo& adafactor_info();
const RuleInfo& came_info();

// Throws std::invalid_argument if there is no such rule.
RuleId find_rule(std::string_view name);

}  // namespace onepass
