// Helpers for tests of rules with sums over a tensor.
#pragma once

#include <doctest/doctest.h>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "cases.h"
#include "reference.h"

namespace onepass::testing {

// The settings whose steps take sums.
inline std::vector<Setting> settings_with_sums() {
  std::vector<Setting> found;
  for (const Setting& setting : kSettings)
    if (info_of(setting.rule).takes_sums(setting.hyper.data())) found.push_back(setting);
  return found;
}

inline bool is_near(double got, double want) {
  if (std::isnan(want)) return std::isnan(got);
  return got == want || std::fabs(got - want) <= 1e-14 * (1.0 + std::fabs(want));
}

// Checks elements and scalars. Sums are added in another order than the reference's, so in float64, where they are as
// exact as the arithmetic, elements are near; in float32 they have the same bits.
inline void check_near(Problem got, Problem want) {
  for (std::size_t n = 0; n < kMaxScalars; ++n) CHECK(is_near(got.setting.scalars[n], want.setting.scalars[n]));
  if (!want.wide) {
    CHECK(difference(got, want) == "");
    return;
  }
  for (std::size_t k = 0; k < want.tensors.size(); ++k) {
    if (!uses(want, k)) continue;
    std::int64_t wrong = 0;
    for_each_index(want.shape, [&](const auto& index) {
      const std::int64_t offset = offset_of(index, want.tensors[k].strides);
      if (!is_near(load<double>(got.tensors[k], offset), load<double>(want.tensors[k], offset))) ++wrong;
    });
    CAPTURE(k);
    CHECK(wrong == 0);
  }
}

}  // namespace onepass::testing
