// The kernels, as pointers that the CUDA runtime launches.
#pragma once

#include "cuda/table.h"
#include "rules/registry.h"

namespace onepass::cuda {

struct Pair {
  const void* prepare = nullptr;
  const void* step = nullptr;
};

// The kernel of each rule for rows that are rounded with random bits, with a large table as the argument; null if the
// rule has none.
const void* stochastic_kernel_of(RuleId rule);

// For each rule, with a small table as the argument, and with a large one.
struct Kernels {
  Pair small[kRules];
  Pair large[kRules];
};

// The kernels that measure gradients, by Measure and then in float32 or float64 arithmetic, and the one that finds a
// DeviceClipping.
struct NormKernels {
  const void* small[2][2];
  const void* large[2][2];
  const void* decide;
};
const NormKernels& norm_kernels();

template <class T>
const Kernels& kernels_of();
template <>
const Kernels& kernels_of<float>();
template <>
const Kernels& kernels_of<double>();

// The kernels of a rule whose update depends on sums over its tensor, with a large table as the argument; null for
// other rules.
struct SumKernels {
  const void* sum = nullptr;
  const void* total = nullptr;
  const void* complete = nullptr;
};
template <class T>
SumKernels sum_kernels_of(RuleId rule);
template <>
SumKernels sum_kernels_of<float>(RuleId rule);
template <>
SumKernels sum_kernels_of<double>(RuleId rule);

}  // namespace onepass::cuda
