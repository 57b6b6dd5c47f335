// Adagrad (Duchi, Hazan and Singer 2011, JMLR 12), at step t:
//
//   g'  = g + weight_decay * p               unless the decay is decoupled
//   sum = sum + g'^2
//   lr' = lr / (1 + (t - 1) * lr_decay)
//   p   = p - lr' * weight_decay * p         if the decay is decoupled
//           - lr' * g' / (sqrt(sum) + eps)
#pragma once

#include <array>

#include "rules/math.h"
#include "rules/registry.h"
#include "rules/states.h"
#include "target.h"

namespace onepass::inline ONEPASS_TARGET {

struct Adagrad {
  static constexpr RuleId id = RuleId::adagrad;

  struct Hyper {
    double lr, lr_decay, eps, weight_decay, decoupled_weight_decay;
  };
  static constexpr std::array hyper_names{"lr", "lr_decay", "eps", "weight_decay", "decoupled_weight_decay?"};
  static constexpr std::array state_names{"sum"};
  static constexpr std::array state_sets{all_states(state_names)};
  static constexpr bool counts_steps = true;

  static unsigned states_used(const Hyper&) { return all_states(state_names); }
  static bool takes_sparse(const Hyper& h) { return h.weight_decay == 0.0 || h.decoupled_weight_decay > 0.0; }

  struct Divisors {
    double slowing;
  };
  static constexpr std::array divisor_names{"1 + (step - 1) * lr_decay"};
  ONEPASS_SETUP static Divisors divisors(const Hyper& h, double step) {
    return {.slowing = 1.0 + (step - 1.0) * h.lr_decay};
  }

  template <class T>
  struct Constants {
    T lr, eps, weight_decay, decay;
    Flag<T> coupled, decoupled;
  };

  template <class T>
  ONEPASS_SETUP static Constants<T> prepare(const Hyper& h, double step) {
    const double lr = h.lr / divisors(h, step).slowing;
    const bool decays = h.weight_decay != 0.0;
    const bool decoupled = h.decoupled_weight_decay > 0.0;
    return {.lr = T(lr),
            .eps = T(h.eps),
            .weight_decay = T(h.weight_decay),
            .decay = T(lr * h.weight_decay),
            .coupled = Flag<T>(decays && !decoupled),
            .decoupled = Flag<T>(decays && decoupled)};
  }

  template <class T>
  ONEPASS_INLINE static void update(const Constants<T>& c, T& p, T g, T& sum) {
    g = g + c.weight_decay * only_if(c.coupled, p);
    sum = sum + g * g;
    p = p - (c.decay * only_if(c.decoupled, p) + c.lr * g / (square_root(sum) + c.eps));
  }
};

}  // namespace onepass::inline ONEPASS_TARGET
