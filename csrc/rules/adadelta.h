// Adadelta (Zeiler 2012, arXiv:1212.5701, algorithm 1):
//
//   g' = g + weight_decay * p
//   v  = rho * v + (1 - rho) * g'^2
//   d  = sqrt(u + eps) / sqrt(v + eps) * g'
//   u  = rho * u + (1 - rho) * d^2
//   p  = p - lr * d
//
// |d| is computed as the root of (u + eps) * g' / (v + eps) * g', in this order. That saves one division and one root,
// and nothing in it overflows, because g'^2 / v is 1 / (1 - rho) at most.
#pragma once

#include <array>

#include "rules/math.h"
#include "rules/registry.h"
#include "rules/states.h"
#include "target.h"

namespace onepass::inline ONEPASS_TARGET {

struct Adadelta {
  static constexpr RuleId id = RuleId::adadelta;

  struct Hyper {
    double lr, rho, eps, weight_decay;
  };
  static constexpr std::array hyper_names{"lr", "rho", "eps", "weight_decay"};
  static constexpr std::array state_names{"square_avg", "acc_delta"};
  static constexpr std::array state_codings{Coding::squares, Coding::squares};
  static constexpr std::array state_sets{all_states(state_names)};
  static constexpr bool counts_steps = true;

  static unsigned states_used(const Hyper&) { return all_states(state_names); }

  template <class T>
  struct Constants {
    T lr, eps, weight_decay;
    AverageOfSquares<T> average;
    Flag<T> decays;
  };

  template <class T>
  ONEPASS_SETUP static Constants<T> prepare(const Hyper& h, double /*step*/) {
    return {.lr = T(h.lr),
            .eps = T(h.eps),
            .weight_decay = T(h.weight_decay),
            .average = AverageOfSquares<T>(h.rho),
            .decays = Flag<T>(h.weight_decay != 0.0)};
  }

  template <class T>
  ONEPASS_INLINE static void update(const Constants<T>& c, T& p, T g, T& square_avg, T& acc_delta) {
    g = g + c.weight_decay * only_if(c.decays, p);
    square_avg = c.average(square_avg, g);
    const T delta = square_root((acc_delta + c.eps) * (g / (square_avg + c.eps) * g));
    acc_delta = c.average(acc_delta, delta);
    p = p - c.lr * with_sign_of(g, delta);
  }
};

}  // namespace onepass::inline ONEPASS_TARGET
