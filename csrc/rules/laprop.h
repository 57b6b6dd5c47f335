// LaProp (Ziyin et al. 2020, arXiv:2002.04839, algorithm 1), with decoupled weight decay, at step t:
//
//   v = beta2 * v + (1 - beta2) * g^2
//   m = beta1 * m + (1 - beta1) * g / (sqrt(v / (1 - beta2^t)) + eps)
//   p = p - lr * weight_decay * p - lr / (1 - beta1^t) * m
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

struct LaProp : BiasCorrections, Cautious<LaProp> {
  static constexpr RuleId id = RuleId::laprop;

  struct Hyper {
    double lr, beta1, beta2, eps, weight_decay, cautious, cautious_weight_decay;
  };
  static constexpr std::array hyper_names{
      "lr", "betas[0]", "betas[1]", "eps", "weight_decay", "cautious?", "cautious_weight_decay?"};
  static constexpr std::array state_names{"exp_avg", "exp_avg_sq"};
  static constexpr std::array state_codings{Coding::signed_values, Coding::squares};
  static constexpr std::array state_sets{all_states(state_names)};
  static constexpr bool counts_steps = true;

  static unsigned states_used(const Hyper&) { return all_states(state_names); }

  template <class T>
  struct Constants {
    T step_size, root2, eps, decay;
    Average<T> average1;
    AverageOfSquares<T> average2;
    Caution<T> caution;
    Flag<T> decays;
  };

  template <class T>
  ONEPASS_SETUP static Constants<T> prepare(const Hyper& h, double step) {
    const Divisors d = divisors(h, step);
    const double root2 = std::sqrt(d.correction2);
    return {.step_size = T(h.lr / d.correction1),
            .root2 = T(root2),
            .eps = T(h.eps * root2),
            .decay = T(h.lr * h.weight_decay),
            .average1 = Average<T>(h.beta1),
            .average2 = AverageOfSquares<T>(h.beta2),
            .caution = Caution<T>(h.cautious, h.cautious_weight_decay),
            .decays = Flag<T>(h.weight_decay != 0.0)};
  }

  template <class T>
  ONEPASS_INLINE static T change(const Constants<T>& c, T /*p*/, T& g, T& exp_avg, T& exp_avg_sq) {
    exp_avg_sq = c.average2(exp_avg_sq, g);
    exp_avg = c.average1(exp_avg, c.root2 * g / (square_root(exp_avg_sq) + c.eps));
    return c.step_size * exp_avg;
  }

  template <class T>
  ONEPASS_INLINE static void update(const Constants<T>& c, T& p, T g, T& exp_avg, T& exp_avg_sq) {
    const T u = change(c, p, g, exp_avg, exp_avg_sq);
    p = p - (c.decay * only_if(c.decays & c.caution.decays(p, u), p) + c.caution(u, g));
  }
};

}  // namespace onepass::inline ONEPASS_TARGET
