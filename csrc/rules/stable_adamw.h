// StableAdamW (Wortsman et al. 2023, arXiv:2304.13013, algorithm 2), at step t:
//
//   beta' = beta * (1 - beta^(t - 1)) / (1 - beta^t), for both betas: the averages need no bias correction
//   m = beta1' * m + (1 - beta1') * g
//   v = beta2' * v + (1 - beta2') * g^2
//   r = max(1, rms(g / max(sqrt(v), eps))), the root of the mean of squares over the whole tensor
//   p = p - lr / r * (weight_decay * p + m / (sqrt(v) + eps))
#pragma once

#include <array>
#include <cmath>
#include <cstddef>

#include "rules/bias_corrections.h"
#include "rules/math.h"
#include "rules/registry.h"
#include "rules/states.h"
#include "target.h"

namespace onepass::inline ONEPASS_TARGET {

struct StableAdamW : BiasCorrections {
  static constexpr RuleId id = RuleId::stable_adamw;

  struct Hyper {
    double lr, beta1, beta2, eps, weight_decay;
  };
  static constexpr std::array hyper_names{"lr", "betas[0]", "betas[1]", "eps", "weight_decay"};
  static constexpr std::array state_names{"exp_avg", "exp_avg_sq"};
  static constexpr std::array state_sets{all_states(state_names)};
  static constexpr bool counts_steps = true;

  static unsigned states_used(const Hyper&) { return all_states(state_names); }

  template <class T>
  struct Constants {
    T lr, weight_decay, eps, step_size, decay;
    Average<T> average1;
    AverageOfSquares<T> average2;
    Flag<T> decays;
  };

  template <class T>
  ONEPASS_SETUP static Constants<T> prepare(const Hyper& h, double step) {
    const Divisors d = divisors(h, step);
    const double gain1 = (1.0 - h.beta1) / d.correction1;
    const double gain2 = (1.0 - h.beta2) / d.correction2;
    return {.lr = T(h.lr),
            .weight_decay = T(h.weight_decay),
            .eps = T(h.eps),
            .step_size = T(h.lr),
            .decay = T(h.lr * h.weight_decay),
            .average1 = Average<T>(1.0 - gain1, gain1),
            .average2 = AverageOfSquares<T>(1.0 - gain2, gain2),
            .decays = Flag<T>(h.weight_decay != 0.0)};
  }

  // Of the squares of the gradient over the root of its average of squares.
  static constexpr std::size_t sums = 1;
  template <std::size_t which, class T>
  ONEPASS_INLINE static auto summed(const Constants<T>& c, T /*p*/, T g, T /*exp_avg*/, T exp_avg_sq) {
    return squared(g / maximum(square_root(c.average2(exp_avg_sq, g)), c.eps));
  }
  template <class T>
  ONEPASS_SETUP static void use_sums(Constants<T>& c, const double* found, double elements) {
    const double rms = std::sqrt(found[0] / elements);
    const double divisor = rms < 1.0 ? 1.0 : rms;  // NaN stays NaN
    c.step_size = T(double{c.lr} / divisor);
    c.decay = T(double{c.lr} * double{c.weight_decay} / divisor);
  }

  template <class T>
  ONEPASS_INLINE static void update(const Constants<T>& c, T& p, T g, T& exp_avg, T& exp_avg_sq) {
    exp_avg = c.average1(exp_avg, g);
    exp_avg_sq = c.average2(exp_avg_sq, g);
    p = p - (c.decay * only_if(c.decays, p) + c.step_size * exp_avg / (square_root(exp_avg_sq) + c.eps));
  }
};

}  // namespace onepass::inline ONEPASS_TARGET
