// Adan (Xie et al. 2022, arXiv:2208.06677, algorithm 1; betas are decay rates, as in its implementation), at step t:
//
//   d = g - g of the last step       0 at step 1
//   m = beta1 * m + (1 - beta1) * g
//   v = beta2 * v + (1 - beta2) * d
//   n = beta3 * n + (1 - beta3) * (g + beta2 * d)^2
//   u = lr * (m / (1 - beta1^t) + beta2 * v / (1 - beta2^t)) / (sqrt(n / (1 - beta3^t)) + eps)
//   p = (p - u) / (1 + lr * weight_decay)
//   p = (1 - lr * weight_decay) * p - u        with no_prox
#pragma once

#include <array>
#include <cmath>

#include "rules/cautious.h"
#include "rules/math.h"
#include "rules/registry.h"
#include "rules/states.h"
#include "target.h"

namespace onepass::inline ONEPASS_TARGET {

struct Adan : Cautious<Adan> {
  static constexpr RuleId id = RuleId::adan;

  struct Hyper {
    double lr, beta1, beta2, beta3, eps, weight_decay, no_prox, cautious, cautious_weight_decay;
  };
  static constexpr std::array hyper_names{"lr",       "betas[0]",  "betas[1]",
                                          "betas[2]", "eps",       "weight_decay",
                                          "no_prox!", "cautious?", "cautious_weight_decay?"};
  static constexpr std::array state_names{"exp_avg", "exp_avg_diff", "exp_avg_sq", "neg_pre_grad"};
  static constexpr std::array state_sets{all_states(state_names)};
  static constexpr bool counts_steps = true;

  static unsigned states_used(const Hyper&) { return all_states(state_names); }

  struct Divisors {
    double correction1, correction2, correction3;
  };
  static constexpr std::array divisor_names{"1 - betas[0] ** step", "1 - betas[1] ** step", "1 - betas[2] ** step"};
  ONEPASS_SETUP static Divisors divisors(const Hyper& h, double step) {
    return {.correction1 = 1.0 - std::pow(h.beta1, step),
            .correction2 = 1.0 - std::pow(h.beta2, step),
            .correction3 = 1.0 - std::pow(h.beta3, step)};
  }

  template <class T>
  struct Constants {
    T gain1, gain2, beta2, eps, decay, shrinkage;
    Average<T> average1, average2;
    AverageOfSquares<T> average3;
    Caution<T> caution;
    Flag<T> later, decays, shrinks;
  };

  template <class T>
  ONEPASS_SETUP static Constants<T> prepare(const Hyper& h, double step) {
    const Divisors d = divisors(h, step);
    const double root3 = std::sqrt(d.correction3);
    const double decay = h.lr * h.weight_decay;
    const bool no_prox = h.no_prox != 0.0;
    return {.gain1 = T(h.lr / d.correction1 * root3),
            .gain2 = T(h.lr * h.beta2 / d.correction2 * root3),
            .beta2 = T(h.beta2),
            .eps = T(h.eps * root3),
            .decay = T(decay),
            .shrinkage = T(decay / (1.0 + decay)),
            .average1 = Average<T>(h.beta1),
            .average2 = Average<T>(h.beta2),
            .average3 = AverageOfSquares<T>(h.beta3),
            .caution = Caution<T>(h.cautious, h.cautious_weight_decay),
            .later = Flag<T>(step > 1.0),
            .decays = Flag<T>(decay != 0.0 && no_prox),
            .shrinks = Flag<T>(decay != 0.0 && !no_prox)};
  }

  template <class T>
  ONEPASS_INLINE static T change(const Constants<T>& c, T /*p*/, T& g, T& exp_avg, T& exp_avg_diff, T& exp_avg_sq,
                                 T& neg_pre_grad) {
    const T difference = only_if(c.later, g + neg_pre_grad);
    exp_avg = c.average1(exp_avg, g);
    exp_avg_diff = c.average2(exp_avg_diff, difference);
    exp_avg_sq = c.average3(exp_avg_sq, g + c.beta2 * difference);
    neg_pre_grad = T(0) - g;
    return (c.gain1 * exp_avg + c.gain2 * exp_avg_diff) / (square_root(exp_avg_sq) + c.eps);
  }

  template <class T>
  ONEPASS_INLINE static void update(const Constants<T>& c, T& p, T g, T& exp_avg, T& exp_avg_diff, T& exp_avg_sq,
                                    T& neg_pre_grad) {
    const T u = change(c, p, g, exp_avg, exp_avg_diff, exp_avg_sq, neg_pre_grad);
    const Flag<T> decays = c.caution.decays(p, u);
    p = p - (c.decay * only_if(c.decays & decays, p) + c.caution(u, g));
    p = p - c.shrinkage * only_if(c.shrinks & decays, p);  // p / (1 + decay)
  }
};

}  // namespace onepass::inline ONEPASS_TARGET
