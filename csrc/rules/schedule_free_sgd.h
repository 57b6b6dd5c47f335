// Schedule-Free SGD (Defazio et al. 2024, arXiv:2405.15682), at step t, with y, z and c of schedule_free.h:
//
//   lr_t = lr * min(1, t / warmup_steps)
//   u    = lr_t * (g + weight_decay * y)
#pragma once

#include <array>

#include "rules/math.h"
#include "rules/registry.h"
#include "rules/schedule_free.h"
#include "rules/states.h"
#include "target.h"

namespace onepass::inline ONEPASS_TARGET {

struct ScheduleFreeSgd : ScheduleFree {
  static constexpr RuleId id = RuleId::schedule_free_sgd;

  struct Hyper {
    double lr, momentum, weight_decay, warmup_steps, r, weight_lr_power;
  };
  static constexpr std::array hyper_names{"lr", "momentum", "weight_decay", "warmup_steps", "r", "weight_lr_power"};
  static constexpr std::array state_names{"z"};
  static constexpr std::array state_sets{all_states(state_names)};
  static constexpr bool counts_steps = true;

  static unsigned states_used(const Hyper&) { return all_states(state_names); }

  ONEPASS_SETUP static double lr_at(const Hyper& h, double step) { return h.lr * warmup(h.warmup_steps, step); }

  ONEPASS_SETUP static Scalars advance(const Hyper& h, double step, const Scalars& before) {
    return advanced(h, lr_at(h, step), step, before);
  }

  template <class T>
  struct Constants {
    T lr, decay;
    Points<T> move;
    Flag<T> decays;
  };

  template <class T>
  ONEPASS_SETUP static Constants<T> prepare(const Hyper& h, double step, const Scalars& s) {
    const double lr = lr_at(h, step);
    return {.lr = T(lr),
            .decay = T(lr * h.weight_decay),
            .move = Points<T>(share_of_z(h, step, advance(h, step, s)), h.momentum),
            .decays = Flag<T>(h.weight_decay != 0.0)};
  }

  template <class T>
  ONEPASS_INLINE static void update(const Constants<T>& c, T& p, T g, T& z) {
    c.move(p, z, c.decay * only_if(c.decays, p) + c.lr * g);
  }
};

}  // namespace onepass::inline ONEPASS_TARGET
