// RMSprop (Tieleman and Hinton 2012, lecture 6.5; centered: Graves 2013, arXiv:1308.0850):
//
//   g'  = g + weight_decay * p
//   v   = alpha * v + (1 - alpha) * g'^2
//   a   = alpha * a + (1 - alpha) * g'                with centered
//   s   = v - a^2                                     with centered, else v
//   d   = g' / (sqrt(s) + eps)
//   buf = momentum * buf + d
//   p   = p - lr * buf
//
// The variance v - a^2 is computed from the averages before the step, as alpha * (v - a^2) + alpha * (1 - alpha) *
// (g' - a)^2, which is equal. The difference of the new averages would cancel most digits of the second term. Where
// rounding makes the variance negative, zero is taken; torch's is NaN there.
#pragma once

#include <array>

#include "rules/cautious.h"
#include "rules/math.h"
#include "rules/registry.h"
#include "rules/states.h"
#include "target.h"

namespace onepass::inline ONEPASS_TARGET {

struct Rmsprop : Cautious<Rmsprop> {
  static constexpr RuleId id = RuleId::rmsprop;

  struct Hyper {
    double lr, alpha, eps, weight_decay, momentum, centered, cautious;
  };
  static constexpr std::array hyper_names{"lr", "alpha", "eps", "weight_decay", "momentum", "centered!", "cautious?"};
  static constexpr std::array state_names{"square_avg", "momentum_buffer", "grad_avg"};
  static constexpr std::array state_codings{Coding::squares, Coding::signed_values, Coding::signed_values};
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
    T lr, eps, weight_decay, alpha, spread;
    RunningSum<T> momentum;
    Average<T> average;
    AverageOfSquares<T> square_average;
    Caution<T> caution;
    Flag<T> decays, centered;
  };

  template <class T>
  ONEPASS_SETUP static Constants<T> prepare(const Hyper& h, double /*step*/) {
    return {.lr = T(h.lr),
            .eps = T(h.eps),
            .weight_decay = T(h.weight_decay),
            .alpha = T(h.alpha),
            .spread = T(h.alpha * (1.0 - h.alpha)),
            .momentum = RunningSum<T>(h.momentum),
            .average = Average<T>(h.alpha),
            .square_average = AverageOfSquares<T>(h.alpha),
            .caution = Caution<T>(h.cautious),
            .decays = Flag<T>(h.weight_decay != 0.0),
            .centered = Flag<T>(h.centered != 0.0)};
  }

  // Without the state grad_avg a step is not centered. The compiler then leaves out its terms.
  template <unsigned Set, class T>
  ONEPASS_INLINE static void settle(Constants<T>& c) {
    if constexpr ((Set & kGradients) == 0) c.centered = Flag<T>(false);
  }

  template <class T>
  ONEPASS_INLINE static T change(const Constants<T>& c, T p, T& g, T& square_avg, T& momentum_buffer, T& grad_avg) {
    g = g + c.weight_decay * only_if(c.decays, p);
    const T off = g - grad_avg;
    // An infinite v keeps the variance infinite, also where the square of a is infinite.
    const T variance = c.alpha * (square_avg - finite(grad_avg * grad_avg)) + c.spread * off * off;
    square_avg = c.square_average(square_avg, g);
    grad_avg = c.average(grad_avg, g);
    const T scale = square_root(select(c.centered, maximum(variance, T(0)), square_avg));
    momentum_buffer = c.momentum(momentum_buffer, g / (scale + c.eps));
    return c.lr * momentum_buffer;
  }

  template <class T>
  ONEPASS_INLINE static void update(const Constants<T>& c, T& p, T g, T& square_avg, T& momentum_buffer, T& grad_avg) {
    const T u = change(c, p, g, square_avg, momentum_buffer, grad_avg);
    p = p - c.caution(u, g);
  }
};

}  // namespace onepass::inline ONEPASS_TARGET
