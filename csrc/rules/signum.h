// Signum (Bernstein et al. 2018, arXiv:1802.04434, algorithm 2), with decoupled weight decay:
//
//   m = momentum * m + (1 - momentum) * g
//   p = p - lr * (sign(m) + weight_decay * p)      sign(0) = 0
#pragma once

#include <array>

#include "rules/cautious.h"
#include "rules/math.h"
#include "rules/registry.h"
#include "rules/states.h"
#include "target.h"

namespace onepass::inline ONEPASS_TARGET {

struct Signum : Cautious<Signum> {
  static constexpr RuleId id = RuleId::signum;

  struct Hyper {
    double lr, momentum, weight_decay, cautious, cautious_weight_decay;
  };
  static constexpr std::array hyper_names{"lr", "momentum", "weight_decay", "cautious?", "cautious_weight_decay?"};
  static constexpr std::array state_names{"momentum_buffer"};
  static constexpr std::array state_codings{Coding::signed_values};
  static constexpr std::array state_sets{all_states(state_names)};
  static constexpr bool counts_steps = false;

  static unsigned states_used(const Hyper&) { return all_states(state_names); }
  static bool takes_sparse(const Hyper& h) { return !takes_sums(h); }

  template <class T>
  struct Constants {
    T lr, decay;
    Average<T> average;
    Caution<T> caution;
    Flag<T> decays;
  };

  template <class T>
  ONEPASS_SETUP static Constants<T> prepare(const Hyper& h, double /*step*/) {
    return {.lr = T(h.lr),
            .decay = T(h.lr * h.weight_decay),
            .average = Average<T>(h.momentum),
            .caution = Caution<T>(h.cautious, h.cautious_weight_decay),
            .decays = Flag<T>(h.weight_decay != 0.0)};
  }

  template <class T>
  ONEPASS_INLINE static T change(const Constants<T>& c, T /*p*/, T& g, T& momentum_buffer) {
    momentum_buffer = c.average(momentum_buffer, g);
    return c.lr * sign(momentum_buffer);
  }

  template <class T>
  ONEPASS_INLINE static void update(const Constants<T>& c, T& p, T g, T& momentum_buffer) {
    const T u = change(c, p, g, momentum_buffer);
    p = p - (c.decay * only_if(c.decays & c.caution.decays(p, u), p) + c.caution(u, g));
  }
};

}  // namespace onepass::inline ONEPASS_TARGET
