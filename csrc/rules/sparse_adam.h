// SparseAdam: Adam (Kingma and Ba 2015, arXiv:1412.6980) for the rows that a sparse gradient touches, in torch's form.
// At the parameter's step t, for these rows alone:
//
//   m = m + (1 - beta1) * (g - m)
//   v = v + (1 - beta2) * (g^2 - v)
//   p = p - lr * sqrt(1 - beta2^t) / (1 - beta1^t) * m / (sqrt(v) + eps)
//
// eps is added to the root of v without bias correction; Adam corrects v's bias first. An average that a huge gradient
// has made infinite becomes NaN, as in torch.
#pragma once

#include <array>
#include <cmath>

#include "rules/bias_corrections.h"
#include "rules/math.h"
#include "rules/registry.h"
#include "rules/states.h"
#include "target.h"

namespace onepass::inline ONEPASS_TARGET {

struct SparseAdam : BiasCorrections {
  static constexpr RuleId id = RuleId::sparse_adam;

  struct Hyper {
    double lr, beta1, beta2, eps;
  };
  static constexpr std::array hyper_names{"lr", "betas[0]", "betas[1]", "eps"};
  static constexpr std::array state_names{"exp_avg", "exp_avg_sq"};
  static constexpr std::array state_codings{Coding::signed_values, Coding::squares};
  static constexpr std::array state_sets{all_states(state_names)};
  static constexpr bool counts_steps = true;

  static unsigned states_used(const Hyper&) { return all_states(state_names); }
  static constexpr bool takes_dense = false;
  static bool takes_sparse(const Hyper&) { return true; }

  template <class T>
  struct Constants {
    T step_size, eps, gain1, gain2;
  };

  template <class T>
  ONEPASS_SETUP static Constants<T> prepare(const Hyper& h, double step) {
    const Divisors d = divisors(h, step);
    return {.step_size = T(h.lr / d.correction1 * std::sqrt(d.correction2)),
            .eps = T(h.eps),
            .gain1 = T(1.0 - h.beta1),
            .gain2 = T(1.0 - h.beta2)};
  }

  template <class T>
  ONEPASS_INLINE static void update(const Constants<T>& c, T& p, T g, T& exp_avg, T& exp_avg_sq) {
    exp_avg = exp_avg + c.gain1 * (g - exp_avg);
    exp_avg_sq = exp_avg_sq + c.gain2 * (g * g - exp_avg_sq);
    p = p - c.step_size * exp_avg / (square_root(exp_avg_sq) + c.eps);
  }
};

}  // namespace onepass::inline ONEPASS_TARGET
