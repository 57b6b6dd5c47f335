// LARS (You et al. 2017, arXiv:1708.03888), with the learning rate outside of the buffer, as in torch's SGD:
//
//   r = trust_coefficient * |p| / (|g| + weight_decay * |p| + eps), of the 2-norms over the whole tensor
//   b = momentum * b + r * (g + weight_decay * p)
//   p = p - lr * b, or p - lr * (r * (g + weight_decay * p) + momentum * b) with nesterov
//
// r is 1 if either norm is 0, and without trust_ratio.
#pragma once

#include <array>
#include <cstddef>

#include "rules/math.h"
#include "rules/registry.h"
#include "rules/states.h"
#include "target.h"

namespace onepass::inline ONEPASS_TARGET {

struct Lars {
  static constexpr RuleId id = RuleId::lars;

  struct Hyper {
    double lr, momentum, weight_decay, trust_coefficient, eps, nesterov, trust_ratio;
  };
  static constexpr std::array hyper_names{"lr",  "momentum",  "weight_decay", "trust_coefficient",
                                          "eps", "nesterov!", "trust_ratio!"};
  static constexpr std::array state_names{"momentum_buffer"};
  static constexpr std::array state_sets{all_states(state_names)};
  static constexpr bool counts_steps = false;

  static unsigned states_used(const Hyper&) { return all_states(state_names); }

  template <class T>
  struct Constants {
    T lr, trust_ratio, trust_coefficient, eps, ratio, weight_decay, momentum;
    RunningSum<T> sum;
    Flag<T> decays, looks_ahead;
  };

  template <class T>
  ONEPASS_SETUP static Constants<T> prepare(const Hyper& h, double /*step*/) {
    return {.lr = T(h.lr),
            .trust_ratio = T(h.trust_ratio),
            .trust_coefficient = T(h.trust_coefficient),
            .eps = T(h.eps),
            .ratio = T(1),
            .weight_decay = T(h.weight_decay),
            .momentum = T(h.momentum),
            .sum = RunningSum<T>(h.momentum),
            .decays = Flag<T>(h.weight_decay != 0.0),
            .looks_ahead = Flag<T>(h.nesterov != 0.0)};
  }

  // Of the squares of the parameter, and of the gradient.
  static constexpr std::size_t sums = 2;
  template <std::size_t which, class T>
  ONEPASS_INLINE static auto summed(const Constants<T>& /*c*/, T p, T g, T /*momentum_buffer*/) {
    return squared(which == 0 ? p : g);
  }
  template <class T>
  ONEPASS_SETUP static void use_sums(Constants<T>& c, const double* found, double /*elements*/) {
    if (c.trust_ratio == T(0) || !(found[0] > 0.0 && found[1] > 0.0)) return;
    const double norm = std::sqrt(found[0]);
    const double denominator = std::sqrt(found[1]) + double{c.weight_decay} * norm + double{c.eps};
    c.ratio = T(double{c.trust_coefficient} * norm / denominator);
  }

  template <class T>
  ONEPASS_INLINE static void update(const Constants<T>& c, T& p, T g, T& momentum_buffer) {
    g = c.ratio * (g + c.weight_decay * only_if(c.decays, p));
    momentum_buffer = c.sum(momentum_buffer, g);
    p = p - c.lr * select(c.looks_ahead, g + c.momentum * momentum_buffer, momentum_buffer);
  }
};

}  // namespace onepass::inline ONEPASS_TARGET
