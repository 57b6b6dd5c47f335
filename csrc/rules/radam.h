// RAdam (Liu et al. 2020, arXiv:1908.03265, algorithm 2), at step t:
//
//   g'   = g + weight_decay * p               unless the decay is decoupled
//   m    = beta1 * m + (1 - beta1) * g'
//   v    = beta2 * v + (1 - beta2) * g'^2
//   rho  = 2 / (1 - beta2) - 1,  rho_t = rho - 2 * t * beta2^t / (1 - beta2^t)
//   r    = sqrt((rho_t - 4) (rho_t - 2) rho / ((rho - 4) (rho - 2) rho_t))
//   d    = r * sqrt(1 - beta2^t) / (sqrt(v) + eps)  if rho_t > 5, else 1
//   p    = p - lr * weight_decay * p          if the decay is decoupled
//            - lr / (1 - beta1^t) * m * d
#pragma once

#include <array>
#include <cmath>

#include "rules/bias_corrections.h"
#include "rules/cautious.h"
#include "rules/math.h"
#include "rules/rectification.h"
#include "rules/registry.h"
#include "rules/states.h"
#include "target.h"

namespace onepass::inline ONEPASS_TARGET {

struct Radam : BiasCorrections, Cautious<Radam> {
  static constexpr RuleId id = RuleId::radam;

  struct Hyper {
    double lr, beta1, beta2, eps, weight_decay, decoupled_weight_decay, cautious, cautious_weight_decay;
  };
  static constexpr std::array hyper_names{"lr",           "betas[0]",
                                          "betas[1]",     "eps",
                                          "weight_decay", "decoupled_weight_decay!",
                                          "cautious?",    "cautious_weight_decay?"};
  static constexpr std::array state_names{"exp_avg", "exp_avg_sq"};
  static constexpr std::array state_codings{Coding::signed_values, Coding::squares};
  static constexpr std::array state_sets{all_states(state_names)};
  static constexpr bool counts_steps = true;

  static unsigned states_used(const Hyper&) { return all_states(state_names); }

  template <class T>
  struct Constants {
    T step_size, eps, weight_decay, decay;
    Average<T> average1;
    AverageOfSquares<T> average2;
    Caution<T> caution;
    Flag<T> adapts, coupled, decoupled;
  };

  template <class T>
  ONEPASS_SETUP static Constants<T> prepare(const Hyper& h, double step) {
    const Divisors d = divisors(h, step);
    const Rectification rectification(h.beta2, step);
    const bool adapts = rectification.rho_t > 5.0;
    const double scale = adapts ? std::sqrt(rectification.squared() * d.correction2) : 1.0;
    const bool decays = h.weight_decay != 0.0;
    const bool decoupled = h.decoupled_weight_decay != 0.0;
    return {.step_size = T(h.lr / d.correction1 * scale),
            .eps = T(h.eps),
            .weight_decay = T(h.weight_decay),
            .decay = T(h.lr * h.weight_decay),
            .average1 = Average<T>(h.beta1),
            .average2 = AverageOfSquares<T>(h.beta2),
            .caution = Caution<T>(h.cautious, h.cautious_weight_decay),
            .adapts = Flag<T>(adapts),
            .coupled = Flag<T>(decays && !decoupled),
            .decoupled = Flag<T>(decays && decoupled)};
  }

  template <class T>
  ONEPASS_INLINE static T change(const Constants<T>& c, T p, T& g, T& exp_avg, T& exp_avg_sq) {
    g = g + c.weight_decay * only_if(c.coupled, p);
    exp_avg = c.average1(exp_avg, g);
    exp_avg_sq = c.average2(exp_avg_sq, g);
    return c.step_size * exp_avg / select(c.adapts, square_root(exp_avg_sq) + c.eps, T(1));
  }

  template <class T>
  ONEPASS_INLINE static void update(const Constants<T>& c, T& p, T g, T& exp_avg, T& exp_avg_sq) {
    const T u = change(c, p, g, exp_avg, exp_avg_sq);
    p = p - (c.decay * only_if(c.decoupled & c.caution.decays(p, u), p) + c.caution(u, g));
  }
};

}  // namespace onepass::inline ONEPASS_TARGET
