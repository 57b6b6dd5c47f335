// The rectification of RAdam (Liu et al. 2020, arXiv:1908.03265, section 4): how long the average of squares is, in
// terms of a simple moving average, and by how much its variance exceeds that of a long one.
#pragma once

#include <cmath>

#include "target.h"

namespace onepass::inline ONEPASS_TARGET {

struct Rectification {
  double rho;    // 2 / (1 - beta2) - 1, the length in the limit
  double rho_t;  // rho - 2 * t * beta2^t / (1 - beta2^t)

  ONEPASS_SETUP Rectification(double beta2, double step) : rho(2.0 / (1.0 - beta2) - 1.0) {
    const double power = std::pow(beta2, step);
    rho_t = rho - 2.0 * step * power / (1.0 - power);
  }

  // Returns r^2 = (rho_t - 4) (rho_t - 2) rho / ((rho - 4) (rho - 2) rho_t), which is defined for rho_t > 4.
  ONEPASS_SETUP double squared() const {
    return (rho_t - 4.0) * (rho_t - 2.0) * rho / ((rho - 4.0) * (rho - 2.0) * rho_t);
  }
};

}  // namespace onepass::inline ONEPASS_TARGET
