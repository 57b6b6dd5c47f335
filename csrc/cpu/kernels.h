// The kernels of one instruction set: functions for each arithmetic type.
#pragma once

#include "cpu/factored.h"
#include "cpu/flat.h"
#include "cpu/measure.h"
#include "cpu/scale.h"
#include "cpu/tuning.h"
#include "job.h"

namespace onepass {

using Kernel = void (*)(const Job& job, std::int64_t begin, std::int64_t end, const Tuning& tuning);

// Writes the sums that the update of a rule depends on, over elements [begin, end) of a job.
using SumsKernel = void (*)(const Job& job, std::int64_t begin, std::int64_t end, double* sums);

struct KernelsOfType {
  Kernel rules[kRules];
  SumsKernel sums[kRules];  // null if the rule has no sums
  FactoredKernels factored;
  PassKernels passes;
  MeasureKernel measure;
  ScaleKernel scale;
};

struct Kernels {
  const KernelsOfType& narrow;  // arithmetic in float32
  const KernelsOfType& wide;    // arithmetic in float64

  const KernelsOfType& of_type(bool is_wide) const { return is_wide ? wide : narrow; }

  void run(RuleId rule, const Job& job, std::int64_t begin, std::int64_t end, const Tuning& tuning) const {
    of_type(job.wide).rules[static_cast<int>(rule)](job, begin, end, tuning);
  }
};

}  // namespace onepass
