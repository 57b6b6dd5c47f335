// ADOPT (Taniguchi et al. 2024, arXiv:2411.02853, algorithm 2), at step t:
//
//   g' = g + weight_decay * p                      unless the decay is decoupled
//   at step 1:   v = g'^2, m = 0, and the parameter stays
//   later:       m = beta1 * m + (1 - beta1) * clamp(g' / max(sqrt(v), eps), (t - 1)^clip_exponent)
//                p = p - lr * weight_decay * p     if the decay is decoupled
//                      - lr * m
//                v = beta2 * v + (1 - beta2) * g'^2
//
// So the gradient is divided by an average that it is not part of.
#pragma once

#include <array>
#include <cmath>
#include <limits>

#include "rules/cautious.h"
#include "rules/math.h"
#include "rules/registry.h"
#include "rules/states.h"
#include "target.h"

namespace onepass::inline ONEPASS_TARGET {

struct Adopt : Cautious<Adopt> {
  static constexpr RuleId id = RuleId::adopt;

  struct Hyper {
    double lr, beta1, beta2, eps, weight_decay, clip_exponent, decoupled_weight_decay, cautious, cautious_weight_decay;
  };
  static constexpr std::array hyper_names{"lr",
                                          "betas[0]",
                                          "betas[1]",
                                          "eps",
                                          "weight_decay",
                                          "clip_exponent?",
                                          "decoupled_weight_decay!",
                                          "cautious?",
                                          "cautious_weight_decay?"};
  static constexpr std::array state_names{"exp_avg", "exp_avg_sq"};
  static constexpr std::array state_codings{Coding::signed_values, Coding::squares};
  static constexpr std::array state_sets{all_states(state_names)};
  static constexpr bool counts_steps = true;

  static unsigned states_used(const Hyper&) { return all_states(state_names); }

  template <class T>
  struct Constants {
    T lr, eps, weight_decay, decay, limit;
    Average<T> average1;
    AverageOfSquares<T> average2;
    Caution<T> caution;
    Flag<T> first, later, coupled, decoupled;
  };

  template <class T>
  ONEPASS_SETUP static Constants<T> prepare(const Hyper& h, double step) {
    const bool decays = h.weight_decay != 0.0;
    const bool decoupled = h.decoupled_weight_decay != 0.0;
    const bool clips = h.clip_exponent >= 0.0;
    return {.lr = T(h.lr),
            .eps = T(h.eps),
            .weight_decay = T(h.weight_decay),
            .decay = T(h.lr * h.weight_decay),
            .limit = clips ? T(std::pow(step - 1.0, h.clip_exponent)) : std::numeric_limits<T>::infinity(),
            .average1 = Average<T>(h.beta1),
            .average2 = AverageOfSquares<T>(h.beta2),
            .caution = Caution<T>(h.cautious, h.cautious_weight_decay),
            .first = Flag<T>(step <= 1.0),
            .later = Flag<T>(step > 1.0),
            .coupled = Flag<T>(decays && !decoupled),
            .decoupled = Flag<T>(decays && decoupled)};
  }

  template <class T>
  ONEPASS_INLINE static T change(const Constants<T>& c, T p, T& g, T& exp_avg, T& exp_avg_sq) {
    g = g + c.weight_decay * only_if(c.coupled, p);
    const T normalized = clamped(g / maximum(square_root(exp_avg_sq), c.eps), c.limit);
    const T average = c.average1(exp_avg, normalized);
    exp_avg = only_if(c.later, average);
    exp_avg_sq = select(c.first, g * g, c.average2(exp_avg_sq, g));
    return c.lr * average;
  }

  template <class T>
  ONEPASS_INLINE static void update(const Constants<T>& c, T& p, T g, T& exp_avg, T& exp_avg_sq) {
    const T u = change(c, p, g, exp_avg, exp_avg_sq);
    p = p - only_if(c.later, c.decay * only_if(c.decoupled & c.caution.decays(p, u), p) + c.caution(u, g));
  }
};

}  // namespace onepass::inline ONEPASS_TARGET
