// Signum (Bernstein et al. 2018, arXiv:1802.04434, algorithm 2), with decoupled weight decay:
//
//   m = momentum * m + (1 - momentum) * g
//   p = p - lr * (sign(m) + weight_decay * p)      sign(0) = 0
#pragma once

#include <array>

#include "rules/math.h"
#include "rules/registry.h"
#include "rules/states.h"
#include "target.h"

namespace onepass::inline ONEPASS_TARGET {

struct Signum {
  static constexpr RuleId id = RuleId::signum;

  struct Hyper {
    double lr, momentum, weight_decay;
  };
  static constexpr std::array hyper_names{"lr", "momentum", "weight_decay"};
  static constexpr std::array state_names{"momentum_buffer"};
  static constexpr std::array state_codings{Coding::signed_values};
  static constexpr std::array state_sets{all_states(state_names)};
  static constexpr bool counts_steps = false;

  static unsigned states_used(const Hyper&) { return all_states(state_names); }
  static bool takes_sparse(const Hyper&) { return true; }

  template <class T>
  struct Constants {
    T lr, decay;
    Average<T> average;
    Flag<T> decays;
  };

  template <class T>
  ONEPASS_SETUP static Constants<T> prepare(const Hyper& h, double /*step*/) {
    return {.lr = T(h.lr),
            .decay = T(h.lr * h.weight_decay),
            .average = Average<T>(h.momentum),
            .decays = Flag<T>(h.weight_decay != 0.0)};
  }

  template <class T>
  ONEPASS_INLINE static void update(const Constants<T>& c, T& p, T g, T& momentum_buffer) {
    momentum_buffer = c.average(momentum_buffer, g);
    p = p - (c.decay * only_if(c.decays, p) + c.lr * sign(momentum_buffer));
  }
};

}  // namespace onepass::inline ONEPASS_TARGET
