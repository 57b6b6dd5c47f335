// AdEMAMix (Pagliardini et al. 2024, arXiv:2409.03137, algorithm 1), at step t:
//
//   m  = beta1 * m + (1 - beta1) * g
//   m' = beta3(t) * m' + (1 - beta3(t)) * g
//   v  = beta2 * v + (1 - beta2) * g^2
//   p  = p - lr * ((m / (1 - beta1^t) + alpha(t) * m') / (sqrt(v / (1 - beta2^t)) + eps) + weight_decay * p)
//
// alpha(t) grows linearly from 0 to alpha, and the half-life of m' linearly from that of beta1 to that of beta3, each
// until the end of its warm-up.
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

struct AdEMAMix : BiasCorrections, Cautious<AdEMAMix> {
  static constexpr RuleId id = RuleId::ademamix;

  struct Hyper {
    double lr, beta1, beta2, beta3, alpha, beta3_warmup, alpha_warmup, eps, weight_decay, cautious,
        cautious_weight_decay;
  };
  static constexpr std::array hyper_names{"lr",
                                          "betas[0]",
                                          "betas[1]",
                                          "betas[2]",
                                          "alpha",
                                          "beta3_warmup?",
                                          "alpha_warmup?",
                                          "eps",
                                          "weight_decay",
                                          "cautious?",
                                          "cautious_weight_decay?"};
  static constexpr std::array state_names{"exp_avg", "exp_avg_slow", "exp_avg_sq"};
  static constexpr std::array state_codings{Coding::signed_values, Coding::signed_values, Coding::squares};
  static constexpr std::array state_sets{all_states(state_names)};
  static constexpr bool counts_steps = true;

  static unsigned states_used(const Hyper&) { return all_states(state_names); }

  // The half-life of an average less 1, and its inverse. 1e-8 keeps that of beta = 0 finite, and the bound that of 1.
  ONEPASS_SETUP static double half_life(double beta) {
    const double raised = beta + 1e-8 < 1.0 - 1e-15 ? beta + 1e-8 : 1.0 - 1e-15;
    return std::log(0.5) / std::log(raised) - 1.0;
  }
  ONEPASS_SETUP static double beta_of(double half_life) { return std::pow(0.5, 1.0 / (half_life + 1.0)); }

  ONEPASS_SETUP static double beta3_at(const Hyper& h, double step) {
    if (step >= h.beta3_warmup) return h.beta3;
    const double part = step / h.beta3_warmup;
    return beta_of((1.0 - part) * half_life(h.beta1) + part * half_life(h.beta3));
  }
  ONEPASS_SETUP static double alpha_at(const Hyper& h, double step) {
    return step < h.alpha_warmup ? step / h.alpha_warmup * h.alpha : h.alpha;
  }

  template <class T>
  struct Constants {
    T step_size, gain1, alpha, eps, decay;
    Average<T> average1, average3;
    AverageOfSquares<T> average2;
    Caution<T> caution;
    Flag<T> decays;
  };

  template <class T>
  ONEPASS_SETUP static Constants<T> prepare(const Hyper& h, double step) {
    const Divisors d = divisors(h, step);
    const double root2 = std::sqrt(d.correction2);
    return {.step_size = T(h.lr * root2),
            .gain1 = T(1.0 / d.correction1),
            .alpha = T(alpha_at(h, step)),
            .eps = T(h.eps * root2),
            .decay = T(h.lr * h.weight_decay),
            .average1 = Average<T>(h.beta1),
            .average3 = Average<T>(beta3_at(h, step)),
            .average2 = AverageOfSquares<T>(h.beta2),
            .caution = Caution<T>(h.cautious, h.cautious_weight_decay),
            .decays = Flag<T>(h.weight_decay != 0.0)};
  }

  template <class T>
  ONEPASS_INLINE static T change(const Constants<T>& c, T /*p*/, T& g, T& exp_avg, T& exp_avg_slow, T& exp_avg_sq) {
    exp_avg = c.average1(exp_avg, g);
    exp_avg_slow = c.average3(exp_avg_slow, g);
    exp_avg_sq = c.average2(exp_avg_sq, g);
    const T mixed = c.gain1 * exp_avg + c.alpha * exp_avg_slow;
    return c.step_size * mixed / (square_root(exp_avg_sq) + c.eps);
  }

  template <class T>
  ONEPASS_INLINE static void update(const Constants<T>& c, T& p, T g, T& exp_avg, T& exp_avg_slow, T& exp_avg_sq) {
    const T u = change(c, p, g, exp_avg, exp_avg_slow, exp_avg_sq);
    p = p - (c.decay * only_if(c.decays & c.caution.decays(p, u), p) + c.caution(u, g));
  }
};

}  // namespace onepass::inline ONEPASS_TARGET
