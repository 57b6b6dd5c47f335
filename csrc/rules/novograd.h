// NovoGrad (Ginsburg et al. 2019, arXiv:1905.11286, algorithm 1): one second moment for the whole tensor.
//
//   v = beta2 * v + (1 - beta2) * |g|^2, of the 2-norm over the whole tensor; |g|^2 while v is 0
//   m = beta1 * m + a * (g / (sqrt(v) + eps) + weight_decay * p)
//   p = p - lr * m
//
// a is 1, or 1 - beta1 with grad_averaging.
#pragma once

#include <array>
#include <cmath>
#include <cstddef>

#include "rules/math.h"
#include "rules/registry.h"
#include "rules/states.h"
#include "target.h"

namespace onepass::inline ONEPASS_TARGET {

struct NovoGrad {
  static constexpr RuleId id = RuleId::novograd;

  struct Hyper {
    double lr, beta1, beta2, eps, weight_decay, grad_averaging;
  };
  static constexpr std::array hyper_names{"lr", "betas[0]", "betas[1]", "eps", "weight_decay", "grad_averaging!"};
  static constexpr std::array state_names{"exp_avg"};
  static constexpr std::array state_sets{all_states(state_names)};
  static constexpr bool counts_steps = true;

  struct Scalars {
    double exp_avg_norm_sq;
  };
  static constexpr std::array scalar_names{"exp_avg_norm_sq"};

  static unsigned states_used(const Hyper&) { return all_states(state_names); }

  // Unchanged: use_sums advances it.
  ONEPASS_SETUP static Scalars advance(const Hyper&, double /*step*/, const Scalars& before) { return before; }

  template <class T>
  struct Constants {
    double beta2, eps, share, exp_avg_norm_sq;
    T lr, scale, decay;
    RunningSum<T> sum;
    Flag<T> decays;
  };

  template <class T>
  ONEPASS_SETUP static Constants<T> prepare(const Hyper& h, double /*step*/, const Scalars& before) {
    const double share = h.grad_averaging != 0.0 ? 1.0 - h.beta1 : 1.0;
    return {.beta2 = h.beta2,
            .eps = h.eps,
            .share = share,
            .exp_avg_norm_sq = before.exp_avg_norm_sq,
            .lr = T(h.lr),
            .scale = T(0),
            .decay = T(share * h.weight_decay),
            .sum = RunningSum<T>(h.beta1),
            .decays = Flag<T>(h.weight_decay != 0.0)};
  }

  // Of the squares of the gradient.
  static constexpr std::size_t sums = 1;
  template <std::size_t which, class T>
  ONEPASS_INLINE static auto summed(const Constants<T>& /*c*/, T /*p*/, T g, T /*exp_avg*/) {
    return squared(g);
  }
  template <class T>
  ONEPASS_SETUP static Scalars use_sums(Constants<T>& c, const double* found, double /*elements*/) {
    const double before = c.exp_avg_norm_sq;
    const double after = before == 0.0 ? found[0] : c.beta2 * before + (1.0 - c.beta2) * found[0];
    c.scale = T(c.share / (std::sqrt(after) + c.eps));
    return {after};
  }

  template <class T>
  ONEPASS_INLINE static void update(const Constants<T>& c, T& p, T g, T& exp_avg) {
    exp_avg = c.sum(exp_avg, c.scale * g + c.decay * only_if(c.decays, p));
    p = p - c.lr * exp_avg;
  }
};

}  // namespace onepass::inline ONEPASS_TARGET
