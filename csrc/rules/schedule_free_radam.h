// Schedule-Free RAdam (Defazio et al. 2024, arXiv:2405.15682, and its implementation), at step t, with y, z and c of
// schedule_free.h, and rho_t and r of rectification.h:
//
//   lr_t = lr * r                     if rho_t > 4
//        = lr, or 0 with silent_sgd_phase    else
//   v    = beta2 * v + (1 - beta2) * g^2
//   d    = sqrt(v / (1 - beta2^t)) + eps     if rho_t > 4, else 1
//   u    = lr_t * (g / d + weight_decay * y)
#pragma once

#include <array>
#include <cmath>

#include "rules/bias_corrections.h"
#include "rules/math.h"
#include "rules/rectification.h"
#include "rules/registry.h"
#include "rules/schedule_free.h"
#include "rules/states.h"
#include "target.h"

namespace onepass::inline ONEPASS_TARGET {

struct ScheduleFreeRadam : ScheduleFree, BiasCorrectionOfSquares {
  static constexpr RuleId id = RuleId::schedule_free_radam;

  struct Hyper {
    double lr, beta1, beta2, eps, weight_decay, r, weight_lr_power, silent_sgd_phase;
  };
  static constexpr std::array hyper_names{"lr",           "betas[0]", "betas[1]",        "eps",
                                          "weight_decay", "r",        "weight_lr_power", "silent_sgd_phase!"};
  static constexpr std::array state_names{"z", "exp_avg_sq"};
  static constexpr std::array state_sets{all_states(state_names)};
  static constexpr bool counts_steps = true;

  static unsigned states_used(const Hyper&) { return all_states(state_names); }

  ONEPASS_SETUP static bool adapts_at(const Rectification& rectification) { return rectification.rho_t > 4.0; }
  ONEPASS_SETUP static double lr_at(const Hyper& h, double step) {
    const Rectification rectification(h.beta2, step);
    if (adapts_at(rectification)) return h.lr * std::sqrt(rectification.squared());
    return h.silent_sgd_phase != 0.0 ? 0.0 : h.lr;
  }

  ONEPASS_SETUP static Scalars advance(const Hyper& h, double step, const Scalars& before) {
    return advanced(h, lr_at(h, step), step, before);
  }

  template <class T>
  struct Constants {
    T step_size, eps, decay;
    AverageOfSquares<T> average2;
    Points<T> move;
    Flag<T> adapts, decays;
  };

  template <class T>
  ONEPASS_SETUP static Constants<T> prepare(const Hyper& h, double step, const Scalars& s) {
    const double lr = lr_at(h, step);
    const bool adapts = adapts_at(Rectification(h.beta2, step));
    const double root2 = adapts ? std::sqrt(divisors(h, step, s).correction2) : 1.0;
    return {.step_size = T(lr * root2),
            .eps = T(h.eps * root2),
            .decay = T(lr * h.weight_decay),
            .average2 = AverageOfSquares<T>(h.beta2),
            .move = Points<T>(share_of_z(h, step, advance(h, step, s)), h.beta1),
            .adapts = Flag<T>(adapts),
            .decays = Flag<T>(h.weight_decay != 0.0)};
  }

  template <class T>
  ONEPASS_INLINE static void update(const Constants<T>& c, T& p, T g, T& z, T& exp_avg_sq) {
    exp_avg_sq = c.average2(exp_avg_sq, g);
    const T divisor = select(c.adapts, square_root(exp_avg_sq) + c.eps, T(1));
    c.move(p, z, c.decay * only_if(c.decays, p) + c.step_size * g / divisor);
  }
};

}  // namespace onepass::inline ONEPASS_TARGET
