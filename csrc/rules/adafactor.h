// Adafactor (Shazeer and Stern 2018, arXiv:1804.04235), in torch's form. Of a matrix G of gradients, at step t:
//
//   w    = t^beta2_decay
//   r_i  = r_i + w * (mean over j of g_ij^2 - r_i)             one for each row
//   c_j  = c_j + w * (mean over i of g_ij^2 - c_j)             one for each column
//   v_ij = r_i * c_j / max(mean of all r_i, eps1)
//   u_ij = g_ij / sqrt(max(v_ij, eps1^2))
//   p    = p - lr * weight_decay * p
//            - max(eps2, rms(p)) * min(lr, 1 / sqrt(t)) / max(1, rms(u) / d) * u
//
// A vector has v = v + w * (g^2 - v) instead of r and c. 1 / sqrt(v_ij) is the product of 1 / sqrt(r_i / mean) for each
// row and 1 / sqrt(c_j) for each column, so an element costs one product and a limit of 1 / eps1.
//
// It is not a rule of registry.h, because its means go across elements. It shares the driver cpu/factored.h with CAME.
#pragma once

#include <array>
#include <cmath>

#include "rules/math.h"
#include "rules/states.h"
#include "target.h"

namespace onepass {

struct AdafactorHyper {  // as in a parameter group; eps1 is -1 if it follows from the parameter's dtype
  double lr, beta2_decay, eps1, eps2, d, weight_decay;
};

// The constants of a step, computed from the hyperparameters and the step count.
struct AdafactorConstants {
  double weight = 1.0;  // w
  double rate = 0.0;    // min(lr, 1 / sqrt(t))
  double decay = 0.0;   // lr * weight_decay
  double eps1 = 0.0, eps2 = 0.0, d = 1.0;
};

}  // namespace onepass

namespace onepass::inline ONEPASS_TARGET {

struct Adafactor {
  static constexpr std::array hyper_names{"lr", "beta2_decay", "eps[0]?", "eps[1]", "d", "weight_decay"};
  static constexpr std::array state_names{"row_var", "col_var", "variance"};
  static constexpr unsigned kOfMatrix = state_bit(state_names, "row_var") | state_bit(state_names, "col_var");
  static constexpr unsigned kOfVector = state_bit(state_names, "variance");

  struct Divisors {
    double root, d;
  };
  static constexpr std::array divisor_names{"step ** 0.5", "d"};
  static Divisors divisors(const AdafactorHyper& h, double step) { return {.root = std::sqrt(step), .d = h.d}; }

  static AdafactorConstants prepare(const AdafactorHyper& h, double step) {
    const double slowing = 1.0 / divisors(h, step).root;
    return {.weight = std::pow(step, h.beta2_decay),
            .rate = slowing < h.lr ? slowing : h.lr,
            .decay = h.lr * h.weight_decay,
            .eps1 = h.eps1,
            .eps2 = h.eps2,
            .d = h.d};
  }

  // The factor of u. An rms that is NaN is ignored.
  static double step_size(const AdafactorConstants& c, double rms_param, double rms_update) {
    const double excess = rms_update / c.d;
    return (rms_param > c.eps2 ? rms_param : c.eps2) * c.rate / (excess > 1.0 ? excess : 1.0);
  }

  // The factor of the rows' roots: the root of the mean of the r_i.
  template <class T>
  ONEPASS_INLINE static T row_scale(T mean, T eps1) {
    return square_root(maximum(mean, eps1));
  }

  template <class T>
  ONEPASS_INLINE static T inverse_root(T variance) {
    return T(1) / square_root(variance);
  }

  // Returns u. The root may be infinite, or NaN if one of its operands is NaN.
  template <class T>
  ONEPASS_INLINE static T update(T g, T root, T limit) {
    return g * (limit < root ? limit : root);
  }

  template <class T>
  ONEPASS_INLINE static T apply(T p, T u, T step_size, Flag<T> decays, T decay) {
    return p - (decay * only_if(decays, p) + step_size * u);
  }
};

}  // namespace onepass::inline ONEPASS_TARGET
