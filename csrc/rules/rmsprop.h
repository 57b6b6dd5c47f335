// RMSprop (Tieleman and Hinton 2012, lecture 6.5; centered: Graves 2013, arXiv:1308.0850):
//
//   g'  = g + weight_decay * p
//   v   = alpha * v + (1 - alpha) * g'^2
//   a   = alpha * a + (1 - alpha) * g'                with centered, else 0
//   d   = g' / (sqrt(v - a^2) + eps)
//   buf = momentum * buf + d
//   p   = p - lr * buf
//
// v - a^2, a variance, is held at zero where rounding takes it below; torch makes NaN of it there.
#pragma once

#include <array>

#include "rules/math.h"
#include "rules/registry.h"
#include "rules/states.h"
#include "target.h"

namespace onepass::inline ONEPASS_TARGET {

struct Rmsprop {
  static constexpr RuleId id = RuleId::rmsprop;

  struct Hyper {
    double lr, alpha, eps, weight_decay, momentum, centered;
  };
  static constexpr std::array hyper_names{"lr", "alpha", "eps", "weight_decay", "momentum", "centered"};
  static constexpr std::array state_names{"square_avg", "momentum_buffer", "grad_avg"};
  static constexpr unsigned kSquares = state_bit(state_names, "square_avg");
  static constexpr unsigned kBuffer = state_bit(state_names, "momentum_buffer");
  static constexpr unsigned kGradients = state_bit(state_names, "grad_avg");
  static constexpr std::array state_sets{kSquares, kSquares | kBuffer, kSquares | kGradients,
                                         kSquares | kBuffer | kGradients};
  static constexpr bool counts_steps = true;

  static unsigned states_used(const Hyper& h) {
    return kSquares | (h.momentum > 0.0 ? kBuffer : 0U) | (h.centered != 0.0 ? kGradients : 0U);
  }

  template <class T>
  struct Constants {
    T lr, eps, weight_decay, momentum;
    Average<T> average;
    AverageOfSquares<T> square_average;
    Flag<T> decays, centered;
  };

  template <class T>
  ONEPASS_SETUP static Constants<T> prepare(const Hyper& h, double /*step*/) {
    return {.lr = T(h.lr),
            .eps = T(h.eps),
            .weight_decay = T(h.weight_decay),
            .momentum = T(h.momentum),
            .average = Average<T>(h.alpha),
            .square_average = AverageOfSquares<T>(h.alpha),
            .decays = Flag<T>(h.weight_decay != 0.0),
            .centered = Flag<T>(h.centered != 0.0)};
  }

  // Without the state grad_avg a step is not centered: its terms are left out when the code is compiled.
  template <unsigned Set, class T>
  ONEPASS_INLINE static void settle(Constants<T>& c) {
    if constexpr ((Set & kGradients) == 0) c.centered = Flag<T>(false);
  }

  template <class T>
  ONEPASS_INLINE static void update(const Constants<T>& c, T& p, T g, T& square_avg, T& momentum_buffer, T& grad_avg) {
    g = g + c.weight_decay * only_if(c.decays, p);
    square_avg = c.square_average(square_avg, g);
    grad_avg = c.average(grad_avg, g);
    // An infinite v keeps the variance infinite, though the square of a is infinite, too.
    const T variance = maximum(square_avg - only_if(c.centered, finite(grad_avg * grad_avg)), T(0));
    momentum_buffer = c.momentum * momentum_buffer + g / (square_root(variance) + c.eps);
    p = p - c.lr * momentum_buffer;
  }
};

}  // namespace onepass::inline ONEPASS_TARGET
