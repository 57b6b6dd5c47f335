// The bias corrections of two averages that begin at zero, which Adam and its kin divide by (Kingma and Ba 2015).
#pragma once

#include <array>
#include <cmath>

#include "target.h"

namespace onepass::inline ONEPASS_TARGET {

// A rule with hyperparameters beta1 and beta2 is derived from this, and so has its divisors.
struct BiasCorrections {
  struct Divisors {
    double correction1, correction2;
  };
  static constexpr std::array divisor_names{"1 - betas[0] ** step", "1 - betas[1] ** step"};

  template <class Hyper>
  ONEPASS_SETUP static Divisors divisors(const Hyper& h, double step) {
    return {.correction1 = 1.0 - std::pow(h.beta1, step), .correction2 = 1.0 - std::pow(h.beta2, step)};
  }
};

// As above, for a rule that has scalars, and of whose averages only that of squares is corrected.
struct BiasCorrectionOfSquares {
  struct Divisors {
    double correction2;
  };
  static constexpr std::array divisor_names{"1 - betas[1] ** step"};

  template <class Hyper, class Scalars>
  ONEPASS_SETUP static Divisors divisors(const Hyper& h, double step, const Scalars& /*before*/) {
    return {.correction2 = 1.0 - std::pow(h.beta2, step)};
  }
};

}  // namespace onepass::inline ONEPASS_TARGET
