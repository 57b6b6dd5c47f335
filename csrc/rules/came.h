// CAME (Luo et al. 2023, arXiv:2307.02047, algorithm 2). Of a matrix G of gradients, at each step:
//
//   r_i  = beta2 * r_i + (1 - beta2) * mean over j of (g_ij^2 + eps1)             one for each row
//   c_j  = beta2 * c_j + (1 - beta2) * mean over i of (g_ij^2 + eps1)             one for each column
//   u_ij = g_ij / sqrt(r_i * c_j / mean of all r_i)
//   u    = u / max(1, rms(u) / clip_threshold)
//   m    = beta1 * m + (1 - beta1) * u
//   R_i  = beta3 * R_i + (1 - beta3) * mean over j of ((u_ij - m_ij)^2 + eps2)    one for each row
//   C_j  = beta3 * C_j + (1 - beta3) * mean over i of ((u_ij - m_ij)^2 + eps2)    one for each column
//   p    = p - lr * weight_decay * p - lr * m_ij / sqrt(R_i * C_j / mean of all R_i)
//
// A vector has v = beta2 * v + (1 - beta2) * (g^2 + eps1) instead of r and c, and p = p - lr * weight_decay * p - lr *
// m.
//
// It shares Adafactor's driver and arithmetic (rules/adafactor.h).
#pragma once

#include <array>

#include "rules/states.h"
#include "target.h"

namespace onepass {

struct CameHyper {  // as in a parameter group
  double lr, beta1, beta2, beta3, eps1, eps2, clip_threshold, weight_decay;
};

// The constants of a step.
struct CameConstants {
  double lr = 0.0;
  double decay = 0.0;            // lr * weight_decay
  double momentum_weight = 1.0;  // 1 - beta1
  double square_weight = 1.0;    // 1 - beta2
  double residual_weight = 1.0;  // 1 - beta3
  double eps1 = 0.0, eps2 = 0.0, clip_threshold = 1.0;
};

}  // namespace onepass

namespace onepass::inline ONEPASS_TARGET {

struct Came {
  static constexpr std::array hyper_names{"lr",     "betas[0]", "betas[1]",       "betas[2]",
                                          "eps[0]", "eps[1]",   "clip_threshold", "weight_decay"};
  static constexpr std::array state_names{"exp_avg_sq_row", "exp_avg_sq_col",  "exp_avg_sq",
                                          "exp_avg",        "exp_avg_res_row", "exp_avg_res_col"};
  static constexpr unsigned kOfVector = state_bit(state_names, "exp_avg_sq") | state_bit(state_names, "exp_avg");
  static constexpr unsigned kOfMatrix = all_states(state_names) & ~state_bit(state_names, "exp_avg_sq");

  struct Divisors {
    double clip_threshold;
  };
  static constexpr std::array divisor_names{"clip_threshold"};
  static Divisors divisors(const CameHyper& h, double /*step*/) { return {.clip_threshold = h.clip_threshold}; }

  static CameConstants prepare(const CameHyper& h, double /*step*/) {
    return {.lr = h.lr,
            .decay = h.lr * h.weight_decay,
            .momentum_weight = 1.0 - h.beta1,
            .square_weight = 1.0 - h.beta2,
            .residual_weight = 1.0 - h.beta3,
            .eps1 = h.eps1,
            .eps2 = h.eps2,
            .clip_threshold = h.clip_threshold};
  }

  // The factor of u that clips it. An rms that is NaN is ignored.
  static double clipping(const CameConstants& c, double rms_update) {
    const double excess = rms_update / c.clip_threshold;
    return excess > 1.0 ? 1.0 / excess : 1.0;
  }
};

}  // namespace onepass::inline ONEPASS_TARGET
