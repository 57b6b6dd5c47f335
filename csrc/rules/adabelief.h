// AdaBelief (Zhuang et al. 2020, arXiv:2010.07468, algorithm 2), with decoupled weight decay, at step t:
//
//   m = beta1 * m + (1 - beta1) * g
//   s = beta2 * s + (1 - beta2) * (g - m)^2 + eps
//   p = p - lr * weight_decay * p - lr / (1 - beta1^t) * m / (sqrt(s / (1 - beta2^t)) + eps)
#pragma once

#include <array>
#include <cmath>

#include "rules/bias_corrections.h"
#include "rules/cautious.h"
#include "rules/math.h"
#include "rules/registry.h"
#include "rules/states.h"
#include "target.h"

namespace onepass::inline ONEPASS_TARGET {

struct AdaBelief : BiasCorrections, Cautious<AdaBelief> {
  static constexpr RuleId id = RuleId::adabelief;

  struct Hyper {
    double lr, beta1, beta2, eps, weight_decay, cautious, cautious_weight_decay;
  };
  static constexpr std::array hyper_names{
      "lr", "betas[0]", "betas[1]", "eps", "weight_decay", "cautious?", "cautious_weight_decay?"};
  static constexpr std::array state_names{"exp_avg", "exp_avg_var"};
  static constexpr std::array state_codings{Coding::signed_values, Coding::squares};
  static constexpr std::array state_sets{all_states(state_names)};
  static constexpr bool counts_steps = true;

  static unsigned states_used(const Hyper&) { return all_states(state_names); }

  template <class T>
  struct Constants {
    T beta1, step_size, eps, scaled_eps, decay;
    Average<T> average1;
    AverageOfSquares<T> average2;
    Caution<T> caution;
    Flag<T> decays;
  };

  template <class T>
  ONEPASS_SETUP static Constants<T> prepare(const Hyper& h, double step) {
    const Divisors d = divisors(h, step);
    const double root2 = std::sqrt(d.correction2);
    return {.beta1 = T(h.beta1),
            .step_size = T(h.lr / d.correction1 * root2),
            .eps = T(h.eps),
            .scaled_eps = T(h.eps * root2),
            .decay = T(h.lr * h.weight_decay),
            .average1 = Average<T>(h.beta1),
            .average2 = AverageOfSquares<T>(h.beta2),
            .caution = Caution<T>(h.cautious, h.cautious_weight_decay),
            .decays = Flag<T>(h.weight_decay != 0.0)};
  }

  template <class T>
  ONEPASS_INLINE static T change(const Constants<T>& c, T /*p*/, T& g, T& exp_avg, T& exp_avg_var) {
    const T deviation = c.beta1 * (g - exp_avg);  // g - m, whose rounding error would be m's
    exp_avg = c.average1(exp_avg, g);
    exp_avg_var = c.average2(exp_avg_var, deviation) + c.eps;
    return c.step_size * exp_avg / (square_root(exp_avg_var) + c.scaled_eps);
  }

  template <class T>
  ONEPASS_INLINE static void update(const Constants<T>& c, T& p, T g, T& exp_avg, T& exp_avg_var) {
    const T u = change(c, p, g, exp_avg, exp_avg_var);
    p = p - (c.decay * only_if(c.decays & c.caution.decays(p, u), p) + c.caution(u, g));
  }
};

}  // namespace onepass::inline ONEPASS_TARGET
