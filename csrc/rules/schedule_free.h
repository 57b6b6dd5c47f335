// What the Schedule-Free rules share (Defazio et al. 2024, arXiv:2405.15682). Three points belong to each parameter:
//
//   z   the base optimizer's            the state z
//   x   the weighted mean of all z      evaluated; not stored
//   y   (1 - momentum) * z + momentum * x     where gradients are taken; the parameter
//
// At step t, with the base optimizer's rate lr_t and change u:
//
//   weight_t = t^r * max(lr_1, ..., lr_t)^weight_lr_power
//   c        = weight_t / (weight_1 + ... + weight_t)
//   z'       = z - u
//   x'       = (1 - c) * x + c * z'
//   y'       = (1 - momentum) * z' + momentum * x' = (1 - c) * y + c * z - (1 - momentum * (1 - c)) * u
#pragma once

#include <array>
#include <cmath>

#include "rules/math.h"
#include "target.h"

namespace onepass::inline ONEPASS_TARGET {

// A rule with hyperparameters r and weight_lr_power is derived from this, and so has its scalars.
struct ScheduleFree {
  struct Scalars {
    double lr_max, weight_sum;
  };
  static constexpr std::array scalar_names{"lr_max", "weight_sum"};

  // Returns the factor of a linear warm-up.
  ONEPASS_SETUP static double warmup(double warmup_steps, double step) {
    return step < warmup_steps ? step / warmup_steps : 1.0;
  }

  template <class Hyper>
  ONEPASS_SETUP static Scalars advanced(const Hyper& h, double lr, double step, const Scalars& before) {
    const double lr_max = lr > before.lr_max ? lr : before.lr_max;
    return {.lr_max = lr_max, .weight_sum = before.weight_sum + weight(h, step, lr_max)};
  }

  // Returns c, from the scalars after the step. As long as all rates are 0, it is 0.
  template <class Hyper>
  ONEPASS_SETUP static double share_of_z(const Hyper& h, double step, const Scalars& after) {
    return after.weight_sum > 0.0 ? weight(h, step, after.lr_max) / after.weight_sum : 0.0;
  }

  // Moves both points that are stored.
  template <class T>
  class Points {
   public:
    ONEPASS_SETUP Points(double c, double momentum) : average_(1.0 - c, c), share_(T(1.0 - momentum * (1.0 - c))) {}

    ONEPASS_INLINE void operator()(T& y, T& z, T change) const {
      y = average_(y, z) - share_ * change;
      z = z - change;
    }

   private:
    Average<T> average_;
    T share_;
  };

 private:
  template <class Hyper>
  ONEPASS_SETUP static double weight(const Hyper& h, double step, double lr_max) {
    return std::pow(step, h.r) * std::pow(lr_max, h.weight_lr_power);
  }
};

}  // namespace onepass::inline ONEPASS_TARGET
