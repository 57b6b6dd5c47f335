// Schedule-Free AdamW (Defazio et al. 2024, arXiv:2405.15682, algorithm 1, as in its implementation since version 1.3),
// at step t, with y, z and c of schedule_free.h:
//
//   lr_t = lr * min(1, t / warmup_steps)
//   v    = beta2 * v + (1 - beta2) * g^2
//   u    = lr_t * (g / (sqrt(v / (1 - beta2^t)) + eps) + weight_decay * y)
//
// As in adam.h, the bias correction of v is moved into the constants.
#pragma once

#include <array>
#include <cmath>

#include "rules/bias_corrections.h"
#include "rules/math.h"
#include "rules/registry.h"
#include "rules/schedule_free.h"
#include "rules/states.h"
#include "target.h"

namespace onepass::inline ONEPASS_TARGET {

struct ScheduleFreeAdamW : ScheduleFree, BiasCorrectionOfSquares {
  static constexpr RuleId id = RuleId::schedule_free_adamw;

  struct Hyper {
    double lr, beta1, beta2, eps, weight_decay, warmup_steps, r, weight_lr_power;
  };
  static constexpr std::array hyper_names{"lr",           "betas[0]",     "betas[1]", "eps",
                                          "weight_decay", "warmup_steps", "r",        "weight_lr_power"};
  static constexpr std::array state_names{"z", "exp_avg_sq"};
  static constexpr std::array state_sets{all_states(state_names)};
  static constexpr bool counts_steps = true;

  static unsigned states_used(const Hyper&) { return all_states(state_names); }

  ONEPASS_SETUP static double lr_at(const Hyper& h, double step) { return h.lr * warmup(h.warmup_steps, step); }

  ONEPASS_SETUP static Scalars advance(const Hyper& h, double step, const Scalars& before) {
    return advanced(h, lr_at(h, step), step, before);
  }

  template <class T>
  struct Constants {
    T step_size, eps, decay;
    AverageOfSquares<T> average2;
    Points<T> move;
    Flag<T> decays;
  };

  template <class T>
  ONEPASS_SETUP static Constants<T> prepare(const Hyper& h, double step, const Scalars& s) {
    const double lr = lr_at(h, step);
    const double root2 = std::sqrt(divisors(h, step, s).correction2);
    return {.step_size = T(lr * root2),
            .eps = T(h.eps * root2),
            .decay = T(lr * h.weight_decay),
            .average2 = AverageOfSquares<T>(h.beta2),
            .move = Points<T>(share_of_z(h, step, advance(h, step, s)), h.beta1),
            .decays = Flag<T>(h.weight_decay != 0.0)};
  }

  template <class T>
  ONEPASS_INLINE static void update(const Constants<T>& c, T& p, T g, T& z, T& exp_avg_sq) {
    exp_avg_sq = c.average2(exp_avg_sq, g);
    c.move(p, z, c.decay * only_if(c.decays, p) + c.step_size * g / (square_root(exp_avg_sq) + c.eps));
  }
};

}  // namespace onepass::inline ONEPASS_TARGET
