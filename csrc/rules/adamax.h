// Adamax (Kingma and Ba 2015, arXiv:1412.6980, algorithm 2), at step t:
//
//   g' = g + weight_decay * p
//   m  = beta1 * m + (1 - beta1) * g'
//   u  = max(beta2 * u, |g'| + eps)
//   p  = p - lr / (1 - beta1^t) * m / u
#pragma once

#include <array>
#include <cmath>

#include "rules/cautious.h"
#include "rules/math.h"
#include "rules/registry.h"
#include "rules/states.h"
#include "target.h"

namespace onepass::inline ONEPASS_TARGET {

struct Adamax : Cautious<Adamax> {
  static constexpr RuleId id = RuleId::adamax;

  struct Hyper {
    double lr, beta1, beta2, eps, weight_decay, cautious;
  };
  static constexpr std::array hyper_names{"lr", "betas[0]", "betas[1]", "eps", "weight_decay", "cautious?"};
  static constexpr std::array state_names{"exp_avg", "exp_inf"};
  static constexpr std::array state_codings{Coding::signed_values, Coding::magnitudes};
  static constexpr std::array state_sets{all_states(state_names)};
  static constexpr bool counts_steps = true;

  static unsigned states_used(const Hyper&) { return all_states(state_names); }

  struct Divisors {
    double correction1;
  };
  static constexpr std::array divisor_names{"1 - betas[0] ** step"};
  ONEPASS_SETUP static Divisors divisors(const Hyper& h, double step) {
    return {.correction1 = 1.0 - std::pow(h.beta1, step)};
  }

  template <class T>
  struct Constants {
    T step_size, beta2, eps, weight_decay;
    Average<T> average1;
    Caution<T> caution;
    Flag<T> decays;
  };

  template <class T>
  ONEPASS_SETUP static Constants<T> prepare(const Hyper& h, double step) {
    return {.step_size = T(h.lr / divisors(h, step).correction1),
            .beta2 = T(h.beta2),
            .eps = T(h.eps),
            .weight_decay = T(h.weight_decay),
            .average1 = Average<T>(h.beta1),
            .caution = Caution<T>(h.cautious),
            .decays = Flag<T>(h.weight_decay != 0.0)};
  }

  template <class T>
  ONEPASS_INLINE static T change(const Constants<T>& c, T p, T& g, T& exp_avg, T& exp_inf) {
    g = g + c.weight_decay * only_if(c.decays, p);
    exp_avg = c.average1(exp_avg, g);
    exp_inf = maximum(c.beta2 * exp_inf, magnitude(g) + c.eps);
    return c.step_size * exp_avg / exp_inf;
  }

  template <class T>
  ONEPASS_INLINE static void update(const Constants<T>& c, T& p, T g, T& exp_avg, T& exp_inf) {
    const T u = change(c, p, g, exp_avg, exp_inf);
    p = p - c.caution(u, g);
  }
};

}  // namespace onepass::inline ONEPASS_TARGET
