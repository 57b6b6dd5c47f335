// Prodigy (Mishchenko and Defazio 2024, arXiv:2306.06101, algorithm 4): Adam, whose steps are as long as the distance d
// to the solution, which is estimated. At step t, with L = lr * sqrt(1 - beta2^t) / (1 - beta1^t) if
// use_bias_correction, else lr:
//
//   g' = g + weight_decay * p                 unless the decay is decoupled (decouple)
//   m  = beta1 * m + (1 - beta1) * d * g'
//   v  = beta2 * v + (1 - beta2) * (d * g')^2
//   r  = beta3 * r + d / d0 * w * <g', p0 - p>     w = d * L; p0: the parameter before the first step
//   s  = beta3 * s + d / d0 * w * g'               w = d with safeguard_warmup
//   p  = p - d * L * weight_decay * p         if the decay is decoupled
//          - d * L * m / (sqrt(v) + d * eps)
//
// The next d follows from r and |s|_1 of all tensors (optimizers/prodigy.py), which this step does not depend on. If
// they are measured on a slice of each tensor (slice_p), r and s are that file's, too.
#pragma once

#include <array>
#include <cmath>
#include <cstddef>

#include "rules/math.h"
#include "rules/registry.h"
#include "rules/states.h"
#include "target.h"

namespace onepass::inline ONEPASS_TARGET {

struct Prodigy {
  static constexpr RuleId id = RuleId::prodigy;

  struct Hyper {
    double lr, beta1, beta2, beta3, eps, weight_decay, d, d0, decouple, use_bias_correction, safeguard_warmup, slice_p;
  };
  static constexpr std::array hyper_names{"lr",
                                          "betas[0]",
                                          "betas[1]",
                                          "beta3?",
                                          "eps",
                                          "weight_decay",
                                          "d",
                                          "d0",
                                          "decouple!",
                                          "use_bias_correction!",
                                          "safeguard_warmup!",
                                          "slice_p"};
  static constexpr std::array state_names{"exp_avg", "exp_avg_sq", "s", "p0"};
  static constexpr unsigned kAverages = state_bit(state_names, "exp_avg") | state_bit(state_names, "exp_avg_sq");
  static constexpr std::array state_sets{kAverages, all_states(state_names)};
  static constexpr bool counts_steps = true;

  // The tensor's shares of the numerator and the denominator of the estimate: r and |s|_1.
  struct Scalars {
    double d_numerator, d_denom;
  };
  static constexpr std::array scalar_names{"d_numerator", "d_denom"};

  static bool takes_sums(const Hyper& h) { return h.slice_p == 1.0; }
  static unsigned states_used(const Hyper& h) { return takes_sums(h) ? all_states(state_names) : kAverages; }

  struct Divisors {
    double d0;
  };
  static constexpr std::array divisor_names{"d0"};
  ONEPASS_SETUP static Divisors divisors(const Hyper& h, double /*step*/, const Scalars& /*before*/) { return {h.d0}; }

  // Unchanged: use_sums advances them.
  ONEPASS_SETUP static Scalars advance(const Hyper&, double /*step*/, const Scalars& before) { return before; }

  template <class T>
  struct Constants {
    double kept_numerator, numerator_weight;
    T d, step_size, eps, weight_decay, decay, weight, one;
    Average<T> average1;
    AverageOfSquares<T> average2;
    RunningSum<T> sum;
    Flag<T> coupled, decoupled;
  };

  template <class T>
  ONEPASS_SETUP static Constants<T> prepare(const Hyper& h, double step, const Scalars& before) {
    const double correction = std::sqrt(1.0 - std::pow(h.beta2, step)) / (1.0 - std::pow(h.beta1, step));
    const double step_size = h.d * h.lr * (h.use_bias_correction != 0.0 ? correction : 1.0);
    const double beta3 = h.beta3 < 0.0 ? std::sqrt(h.beta2) : h.beta3;
    const double growth = h.d / h.d0;
    const bool decays = h.weight_decay != 0.0;
    const bool decoupled = h.decouple != 0.0;
    return {.kept_numerator = beta3 * before.d_numerator,
            .numerator_weight = growth * step_size,
            .d = T(h.d),
            .step_size = T(step_size),
            .eps = T(h.d * h.eps),
            .weight_decay = T(h.weight_decay),
            .decay = T(step_size * h.weight_decay),
            .weight = T(growth * (h.safeguard_warmup != 0.0 ? h.d : step_size)),
            .one = T(1),
            .average1 = Average<T>(h.beta1),
            .average2 = AverageOfSquares<T>(h.beta2),
            .sum = RunningSum<T>(beta3),
            .coupled = Flag<T>(decays && !decoupled),
            .decoupled = Flag<T>(decays && decoupled)};
  }

  // Of g' * (p0 - p), and of the magnitudes of s.
  static constexpr std::size_t sums = 2;
  static constexpr bool sums_only_for_scalars = true;
  template <std::size_t which, class T>
  ONEPASS_INLINE static auto summed(const Constants<T>& c, T p, T g, T /*exp_avg*/, T /*exp_avg_sq*/, T s, T p0) {
    g = g + c.weight_decay * only_if(c.coupled, p);
    if constexpr (which == 0) {
      return Product<T>{g, p0 - p};
    } else {
      return double{magnitude(c.sum(s, c.weight * g))};
    }
  }
  template <class T>
  ONEPASS_SETUP static Scalars use_sums(Constants<T>& c, const double* found, double /*elements*/) {
    return {c.kept_numerator + c.numerator_weight * found[0], found[1]};
  }

  template <class T>
  ONEPASS_INLINE static void update(const Constants<T>& c, T& p, T g, T& exp_avg, T& exp_avg_sq, T& s, T& p0) {
    g = g + c.weight_decay * only_if(c.coupled, p);
    s = c.sum(s, c.weight * g);
    g = c.d * g;
    exp_avg = c.average1(exp_avg, g);
    exp_avg_sq = c.average2(exp_avg_sq, g);
    p0 = c.one * p0;  // what is stored has to come out of arithmetic
    p = p - (c.decay * only_if(c.decoupled, p) + c.step_size * exp_avg / (square_root(exp_avg_sq) + c.eps));
  }
};

}  // namespace onepass::inline ONEPASS_TARGET
