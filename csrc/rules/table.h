// What the bindings and the tests know of a rule: names, and how its constants are made. No kernels.
#pragma once

#include <span>

#include "rules/registry.h"

namespace onepass {

struct RuleInfo {
  const char* name;
  std::span<const char* const> hyper_names;  // "lr", "betas[0]", ...: keys of a parameter group
  std::span<const char* const> state_names;  // in the order of the operands; a step uses the first `states_used`
  bool counts_steps;                         // whether each parameter has a counter `step`

  // How many states a step with these hyperparameters (in the order of hyper_names) reads and writes.
  int (*states_used)(const double* hyper);

  // Writes the constants of one step, at most kMaxConstantBytes, for arithmetic in float32 or, if wide, float64.
  // `step` counts from 1; for a rule that does not count it is 1 while the states are new, else 2.
  void (*prepare)(const double* hyper, double step, bool wide, void* constants);
};

const RuleInfo& info_of(RuleId rule);

}  // namespace onepass
