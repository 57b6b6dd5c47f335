// Averaged stochastic gradient descent (Polyak and Juditsky 1992, in the form of Bottou 2010 that torch uses), at step
// t:
//
//   g'  = g + weight_decay * p
//   p   = (1 - eta * lambd) * p - eta * g'
//   ax  = ax + mu * (p - ax)                       the average; p itself while mu is 1
//   eta = lr / (1 + lambd * lr * t)^alpha          both for the next step
//   mu  = 1 / max(1, t - t0)
#pragma once

#include <array>
#include <cmath>

#include "rules/math.h"
#include "rules/registry.h"
#include "rules/states.h"
#include "target.h"

namespace onepass::inline ONEPASS_TARGET {

struct Asgd {
  static constexpr RuleId id = RuleId::asgd;

  struct Hyper {
    double lr, lambd, alpha, t0, weight_decay;
  };
  static constexpr std::array hyper_names{"lr", "lambd", "alpha", "t0", "weight_decay"};
  static constexpr std::array state_names{"ax"};
  static constexpr std::array state_sets{all_states(state_names)};
  static constexpr bool counts_steps = true;

  // eta and mu of this step were computed by the last step. So a new `lr` acts from the next step on.
  struct Scalars {
    double eta, mu;
  };
  static constexpr std::array scalar_names{"eta", "mu"};

  static unsigned states_used(const Hyper&) { return all_states(state_names); }

  struct Divisors {
    double slowing;
  };
  static constexpr std::array divisor_names{"(1 + lambd * lr * step) ** alpha"};
  ONEPASS_SETUP static Divisors divisors(const Hyper& h, double step, const Scalars& /*before*/) {
    return {.slowing = std::pow(1.0 + h.lambd * h.lr * step, h.alpha)};
  }

  template <class T>
  struct Constants {
    T eta, decay, weight_decay, mu;
    Flag<T> decays, follows;
  };

  template <class T>
  ONEPASS_SETUP static Constants<T> prepare(const Hyper& h, double /*step*/, const Scalars& s) {
    return {.eta = T(s.eta),
            .decay = T(h.lambd * s.eta),
            .weight_decay = T(h.weight_decay),
            .mu = T(s.mu),
            .decays = Flag<T>(h.weight_decay != 0.0),
            .follows = Flag<T>(s.mu == 1.0)};
  }

  ONEPASS_SETUP static Scalars advance(const Hyper& h, double step, const Scalars& before) {
    return {.eta = h.lr / divisors(h, step, before).slowing, .mu = 1.0 / std::fmax(1.0, step - h.t0)};
  }

  template <class T>
  ONEPASS_INLINE static void update(const Constants<T>& c, T& p, T g, T& ax) {
    g = g + c.weight_decay * only_if(c.decays, p);
    p = p - (c.decay * finite(p) + c.eta * g);  // an infinite p stays infinite, as in torch
    ax = select(c.follows, p, ax + c.mu * (p - ax));
  }
};

}  // namespace onepass::inline ONEPASS_TARGET
