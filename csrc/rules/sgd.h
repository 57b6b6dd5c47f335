// SGD with momentum, dampening and Nesterov momentum (Sutskever et al. 2013, in torch's form).
//
//   g'  = g + weight_decay * p
//   buf = g'                                       at the first step
//       = momentum * buf + (1 - dampening) * g'    afterwards
//   d   = g' + momentum * buf   with nesterov, else buf (g' without momentum)
//   p   = p - lr * d
#pragma once

#include <array>

#include "rules/math.h"
#include "target.h"

namespace onepass::inline ONEPASS_TARGET {

struct Sgd {
  struct Hyper {
    double lr, momentum, dampening, weight_decay, nesterov;
  };
  static constexpr std::array hyper_names{"lr", "momentum", "dampening", "weight_decay", "nesterov"};
  static constexpr std::array state_names{"momentum_buffer"};
  static constexpr bool counts_steps = false;  // `step` is 1 for a tensor whose states are new, else 2

  static int states_used(const Hyper& h) { return h.momentum != 0.0 ? 1 : 0; }

  template <class T>
  struct Constants {
    T lr, momentum, undamped, weight_decay;
    bool first, decays, nesterov, plain;
  };

  template <class T>
  static Constants<T> prepare(const Hyper& h, double step) {
    return {.lr = T(h.lr),
            .momentum = T(h.momentum),
            .undamped = T(1.0 - h.dampening),
            .weight_decay = T(h.weight_decay),
            .first = step == 1.0,
            .decays = h.weight_decay != 0.0,
            .nesterov = h.nesterov != 0.0,
            .plain = h.momentum == 0.0};
  }

  template <class T>
  ONEPASS_INLINE static void update(const Constants<T>& c, T& p, T g, T& momentum_buffer) {
    g = c.decays ? g + c.weight_decay * p : g;
    momentum_buffer = c.first ? g : c.momentum * momentum_buffer + c.undamped * g;
    const T direction = c.nesterov ? g + c.momentum * momentum_buffer : momentum_buffer;
    p = p - c.lr * (c.plain ? g : direction);
  }
};

}  // namespace onepass::inline ONEPASS_TARGET
