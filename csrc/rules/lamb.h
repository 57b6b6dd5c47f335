// LAMB (You et al. 2020, arXiv:1904.00962, algorithm 2, with phi(x) = x), at step t:
//
//   m = beta1 * m + (1 - beta1) * g
//   v = beta2 * v + (1 - beta2) * g^2
//   u = m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps) + weight_decay * p
//   p = p - lr * r * u
//
// The trust ratio r is |p| / |u|, of the 2-norms over the whole tensor; 1 if either is 0, and without trust_ratio. With
// trust_clip it is at most 1.
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

struct Lamb : BiasCorrections {
  static constexpr RuleId id = RuleId::lamb;

  struct Hyper {
    double lr, beta1, beta2, eps, weight_decay, trust_ratio, trust_clip;
  };
  static constexpr std::array hyper_names{"lr",           "betas[0]",     "betas[1]",   "eps",
                                          "weight_decay", "trust_ratio!", "trust_clip!"};
  static constexpr std::array state_names{"exp_avg", "exp_avg_sq"};
  static constexpr std::array state_sets{all_states(state_names)};
  static constexpr bool counts_steps = true;

  static unsigned states_used(const Hyper&) { return all_states(state_names); }

  template <class T>
  struct Constants {
    T lr, trust_ratio, trust_clip, step_size, gain1, eps, weight_decay;
    Average<T> average1;
    AverageOfSquares<T> average2;
    Flag<T> decays;
  };

  template <class T>
  ONEPASS_SETUP static Constants<T> prepare(const Hyper& h, double step) {
    const Divisors d = divisors(h, step);
    const double root2 = std::sqrt(d.correction2);
    return {.lr = T(h.lr),
            .trust_ratio = T(h.trust_ratio),
            .trust_clip = T(h.trust_clip),
            .step_size = T(h.lr),
            .gain1 = T(root2 / d.correction1),
            .eps = T(h.eps * root2),
            .weight_decay = T(h.weight_decay),
            .average1 = Average<T>(h.beta1),
            .average2 = AverageOfSquares<T>(h.beta2),
            .decays = Flag<T>(h.weight_decay != 0.0)};
  }

  // Of the squares of the parameter, and of u.
  static constexpr std::size_t sums = 2;
  template <std::size_t which, class T>
  ONEPASS_INLINE static auto summed(const Constants<T>& c, T p, T g, T exp_avg, T exp_avg_sq) {
    if constexpr (which == 0) return squared(p);
    return squared(direction(c, p, c.average1(exp_avg, g), c.average2(exp_avg_sq, g)));
  }
  template <class T>
  ONEPASS_SETUP static void use_sums(Constants<T>& c, const double* found, double /*elements*/) {
    if (c.trust_ratio == T(0) || !(found[0] > 0.0 && found[1] > 0.0)) return;
    const double ratio = std::sqrt(found[0]) / std::sqrt(found[1]);
    c.step_size = T(double{c.lr} * (c.trust_clip != T(0) && ratio > 1.0 ? 1.0 : ratio));
  }

  template <class T>
  ONEPASS_INLINE static void update(const Constants<T>& c, T& p, T g, T& exp_avg, T& exp_avg_sq) {
    exp_avg = c.average1(exp_avg, g);
    exp_avg_sq = c.average2(exp_avg_sq, g);
    p = p - c.step_size * direction(c, p, exp_avg, exp_avg_sq);
  }

 private:
  template <class T>
  ONEPASS_INLINE static T direction(const Constants<T>& c, T p, T exp_avg, T exp_avg_sq) {
    return c.weight_decay * only_if(c.decays, p) + c.gain1 * exp_avg / (square_root(exp_avg_sq) + c.eps);
  }
};

}  // namespace onepass::inline ONEPASS_TARGET
