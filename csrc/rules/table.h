// What the bindings and the tests know of a rule: names, and how its constants are made. No kernels.
#pragma once

#include <array>
#include <cstddef>
#include <span>
#include <string_view>

#include "rules/registry.h"

namespace onepass {

struct RuleInfo {
  const char* name;
  // "lr", "betas[0]", ...: keys of a group. With "?" it may be None or missing; with "!" it is true or false.
  std::span<const char* const> hyper_names;
  std::span<const char* const> state_names;   // in the order of the operands
  std::span<const char* const> scalar_names;  // numbers kept for each parameter, beside its step
  bool counts_steps;                          // whether each parameter has a counter `step`
  std::array<std::size_t, 2> constants_size;  // bytes of the constants of a step, in float32 and in float64

  // Which states a step with these hyperparameters (in the order of hyper_names) reads and writes: a bit for each.
  unsigned (*states_used)(const double* hyper);

  // Whether a step with these hyperparameters is defined for the rows that a sparse gradient touches. For a dense
  // gradient every rule is, but for one.
  bool (*takes_sparse)(const double* hyper);
  bool takes_dense;

  // Writes the constants of one step, at most kMaxConstantBytes, for arithmetic in float32 or, if wide, float64.
  // `step` counts from 1; for a rule that does not count it is 1 while the states are new, else 2. `scalars` are as the
  // last step left them.
  void (*prepare)(const double* hyper, double step, const double* scalars, bool wide, void* constants);

  // The first divisor of these constants that is zero, as a formula; null: there is none.
  const char* (*zero_divisor)(const double* hyper, double step, const double* scalars);

  // Takes the scalars from before this step to after it.
  void (*advance)(const double* hyper, double step, double* scalars);
};

const RuleInfo& info_of(RuleId rule);

// Adafactor's, which has a driver of its own (cpu/factored.h). States: row_var and col_var, or variance for a vector.
const RuleInfo& adafactor_info();

// Throws std::invalid_argument if there is no such rule.
RuleId find_rule(std::string_view name);

}  // namespace onepass
