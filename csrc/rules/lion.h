// Lion (Chen et al. 2023, arXiv:2302.06675, algorithm 2):
//
//   c = beta1 * m + (1 - beta1) * g
//   p = p - lr * (sign(c) + weight_decay * p)      sign(0) = 0
//   m = beta2 * m + (1 - beta2) * g
#pragma once

#include <array>

#include "rules/cautious.h"
#include "rules/math.h"
#include "rules/registry.h"
#include "rules/states.h"
#include "target.h"

namespace onepass::inline ONEPASS_TARGET {

struct Lion : Cautious<Lion> {
  static constexpr RuleId id = RuleId::lion;

  struct Hyper {
    double lr, beta1, beta2, weight_decay, cautious, cautious_weight_decay;
  };
  static constexpr std::array hyper_names{"lr",           "betas[0]",  "betas[1]",
                                          "weight_decay", "cautious?", "cautious_weight_decay?"};
  static constexpr std::array state_names{"exp_avg"};
  static constexpr std::array state_codings{Coding::signed_values};
  static constexpr std::array state_sets{all_states(state_names)};
  static constexpr bool counts_steps = false;

  static unsigned states_used(const Hyper&) { return all_states(state_names); }
  static bool takes_sparse(const Hyper& h) { return !takes_sums(h); }

  template <class T>
  struct Constants {
    T lr, beta1, gain1, decay;
    Average<T> average2;
    Caution<T> caution;
    Flag<T> decays;
  };

  template <class T>
  ONEPASS_SETUP static Constants<T> prepare(const Hyper& h, double /*step*/) {
    return {.lr = T(h.lr),
            .beta1 = T(h.beta1),
            .gain1 = T(1.0 - h.beta1),
            .decay = T(h.lr * h.weight_decay),
            .average2 = Average<T>(h.beta2),
            .caution = Caution<T>(h.cautious, h.cautious_weight_decay),
            .decays = Flag<T>(h.weight_decay != 0.0)};
  }

  template <class T>
  ONEPASS_INLINE static T change(const Constants<T>& c, T /*p*/, T& g, T& exp_avg) {
    const T u = c.lr * sign(c.beta1 * exp_avg + c.gain1 * g);
    exp_avg = c.average2(exp_avg, g);
    return u;
  }

  template <class T>
  ONEPASS_INLINE static void update(const Constants<T>& c, T& p, T g, T& exp_avg) {
    const T u = change(c, p, g, exp_avg);
    p = p - (c.decay * only_if(c.decays & c.caution.decays(p, u), p) + c.caution(u, g));
  }
};

}  // namespace onepass::inline ONEPASS_TARGET
