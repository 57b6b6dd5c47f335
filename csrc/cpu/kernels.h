// The kernels of one instruction set: a function for each rule and arithmetic type.
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

struct Kernels {
  Kernel narrow[kRules];           // arithmetic in float32
  Kernel wide[kRules];             // arithmetic in float64
  SumsKernel narrow_sums[kRules];  // null if the rule has no sums
  SumsKernel wide_sums[kRules];
  FactoredKernels factored_narrow;
  FactoredKernels factored_wide;
  PassKernels narrow_passes;
  PassKernels wide_passes;
  MeasureKernel measure_narrow;
  MeasureKernel measure_wide;
  ScaleKernel scale_narrow;
  ScaleKernel scale_wide;

  void run(RuleId rule, const Job& job, std::int64_t begin, std::int64_t end, const Tuning& tuning) const {
    (job.wide ? wide : narrow)[static_cast<int>(rule)](job, begin, end, tuning);
  }
};

}  // namespace onepass
