// SGD with momentum, dampening and Nesterov momentum (Sutskever et al. 2013, in torch's form).
//
//   g'  = g + weight_decay * p
//   buf = g'                                       at the first step
//       = momentum * buf + (1 - dampening) * g'    afterwards
//   d   = g' + momentum * buf   with nesterov, else buf (g' without momentum)
//   p   = p - lr * d
#pragma once

#include <array>

#include "rules/cautious.h"
#include "rules/math.h"
#include "rules/registry.h"
#include "rules/states.h"
#include "target.h"

namespace onepass::inline ONEPASS_TARGET {

struct Sgd : Cautious<Sgd> {
  static constexpr RuleId id = RuleId::sgd;

  struct Hyper {
    double lr, momentum, dampening, weight_decay, nesterov, cautious;
  };
  static constexpr std::array hyper_names{"lr", "momentum", "dampening", "weight_decay", "nesterov!", "cautious?"};
  static constexpr std::array state_names{"momentum_buffer"};
  static constexpr std::array state_codings{Coding::signed_values};
  static constexpr unsigned kBuffer = state_bit(state_names, "momentum_buffer");
  static constexpr std::array state_sets{0U, kBuffer};
  static constexpr bool counts_steps = false;  // `step` is 1 if the states are new, else 2

  static unsigned states_used(const Hyper& h) { return h.momentum != 0.0 ? kBuffer : 0U; }
  static bool takes_sparse(const Hyper& h) { return h.momentum == 0.0 && h.weight_decay == 0.0 && !takes_sums(h); }

  template <class T>
  struct Constants {
    T lr, momentum, undamped, weight_decay, buffer_share;
    Caution<T> caution;
    Flag<T> decays, has_buffer, takes_grad, takes_buffer;
  };

  template <class T>
  ONEPASS_SETUP static Constants<T> prepare(const Hyper& h, double step) {
    const bool first = step == 1.0;
    const bool plain = h.momentum == 0.0;
    const bool nesterov = h.nesterov != 0.0;
    return {.lr = T(h.lr),
            .momentum = T(h.momentum),
            .undamped = T(first ? 1.0 : 1.0 - h.dampening),
            .weight_decay = T(h.weight_decay),
            .buffer_share = T(nesterov ? h.momentum : 1.0),
            .caution = Caution<T>(h.cautious),
            .decays = Flag<T>(h.weight_decay != 0.0),
            .has_buffer = Flag<T>(!first),
            .takes_grad = Flag<T>(plain || nesterov),
            .takes_buffer = Flag<T>(!plain)};
  }

  template <class T>
  ONEPASS_INLINE static T change(const Constants<T>& c, T p, T& g, T& momentum_buffer) {
    g = g + c.weight_decay * only_if(c.decays, p);
    momentum_buffer = c.momentum * only_if(c.has_buffer, momentum_buffer) + c.undamped * g;
    return c.lr * (only_if(c.takes_grad, g) + c.buffer_share * only_if(c.takes_buffer, momentum_buffer));
  }

  template <class T>
  ONEPASS_INLINE static void update(const Constants<T>& c, T& p, T g, T& momentum_buffer) {
    const T u = change(c, p, g, momentum_buffer);
    p = p - c.caution(u, g);
  }
};

}  // namespace onepass::inline ONEPASS_TARGET
