// MARS with AdamW's update (Yuan et al. 2024, arXiv:2411.10438, algorithm 2 with approximate gradient differences), at
// step t:
//
//   c = g + gamma * beta1 / (1 - beta1) * (g - g'), with g' the last gradient; at step 1 c = g
//   c = c / max(1, |c|), of the 2-norm over the whole tensor; not without clip_correction
//   m = beta1 * m + (1 - beta1) * c
//   v = beta2 * v + (1 - beta2) * c^2
//   p = p - lr * (m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps) + weight_decay * p)
#pragma once

#include <array>
#include <cmath>
#include <cstddef>

#include "rules/bias_corrections.h"
#include "rules/math.h"
#include "rules/registry.h"
#include "rules/states.h"
#include "target.h"

namespace onepass::inline ONEPASS_TARGET {

struct Mars : BiasCorrections {
  static constexpr RuleId id = RuleId::mars;

  struct Hyper {
    double lr, beta1, beta2, eps, weight_decay, gamma, clip_correction;
  };
  static constexpr std::array hyper_names{"lr",           "betas[0]", "betas[1]",        "eps",
                                          "weight_decay", "gamma",    "clip_correction!"};
  static constexpr std::array state_names{"exp_avg", "exp_avg_sq", "last_grad"};
  static constexpr std::array state_sets{all_states(state_names)};
  static constexpr bool counts_steps = true;

  static unsigned states_used(const Hyper&) { return all_states(state_names); }

  template <class T>
  struct Constants {
    T clip_correction, gain, divisor, step_size, decay, eps;
    Average<T> average1;
    AverageOfSquares<T> average2;
    Flag<T> differs, decays;
  };

  template <class T>
  ONEPASS_SETUP static Constants<T> prepare(const Hyper& h, double step) {
    const Divisors d = divisors(h, step);
    const double root2 = std::sqrt(d.correction2);
    return {.clip_correction = T(h.clip_correction),
            .gain = T(h.gamma * h.beta1 / (1.0 - h.beta1)),
            .divisor = T(1),
            .step_size = T(h.lr * root2 / d.correction1),
            .decay = T(h.lr * h.weight_decay),
            .eps = T(h.eps * root2),
            .average1 = Average<T>(h.beta1),
            .average2 = AverageOfSquares<T>(h.beta2),
            .differs = Flag<T>(step > 1.0),
            .decays = Flag<T>(h.weight_decay != 0.0)};
  }

  // Of the squares of the corrected gradient.
  static constexpr std::size_t sums = 1;
  template <std::size_t which, class T>
  ONEPASS_INLINE static auto summed(const Constants<T>& c, T /*p*/, T g, T /*exp_avg*/, T /*exp_avg_sq*/, T last_grad) {
    return squared(corrected(c, g, last_grad));
  }
  template <class T>
  ONEPASS_SETUP static void use_sums(Constants<T>& c, const double* found, double /*elements*/) {
    if (c.clip_correction != T(0) && !(found[0] <= 1.0)) c.divisor = T(std::sqrt(found[0]));
  }

  template <class T>
  ONEPASS_INLINE static void update(const Constants<T>& c, T& p, T g, T& exp_avg, T& exp_avg_sq, T& last_grad) {
    const T clipped = corrected(c, g, last_grad) / c.divisor;
    exp_avg = c.average1(exp_avg, clipped);
    exp_avg_sq = c.average2(exp_avg_sq, clipped);
    p = p - (c.decay * only_if(c.decays, p) + c.step_size * exp_avg / (square_root(exp_avg_sq) + c.eps));
    last_grad = g;
  }

 private:
  template <class T>
  ONEPASS_INLINE static T corrected(const Constants<T>& c, T g, T last_grad) {
    return g + c.gain * only_if(c.differs, g - last_grad);
  }
};

}  // namespace onepass::inline ONEPASS_TARGET
