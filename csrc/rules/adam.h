// Adam (Kingma and Ba 2015, arXiv:1412.6980), AMSGrad (Reddi et al. 2018, arXiv:1904.09237) and AdamW (Loshchilov and
// Hutter 2019, arXiv:1711.05101), at step t:
//
//   g' = g + weight_decay * p               unless the decay is decoupled
//   m  = beta1 * m + (1 - beta1) * g'
//   v  = beta2 * v + (1 - beta2) * g'^2
//   w  = max(w, v) with amsgrad, else v
//   p  = p - lr * weight_decay * p          if the decay is decoupled
//          - lr / (1 - beta1^t) * m / (sqrt(w / (1 - beta2^t)) + eps)
//
// The bias corrections are moved out of the root into the constants, which leaves one division. p is written by a
// single subtraction, so it is rounded once.
#pragma once

#include <array>
#include <cmath>

#include "rules/bias_corrections.h"
#include "rules/cautious.h"
#include "rules/math.h"
#include "rules/registry.h"
#include "rules/states.h"
#include "target.h"

namespace onepass::inline ONEPASS_TARGET {

struct Adam : BiasCorrections, Cautious<Adam> {
  static constexpr RuleId id = RuleId::adam;

  struct Hyper {
    double lr, beta1, beta2, eps, weight_decay, amsgrad, decoupled_weight_decay, cautious, cautious_weight_decay;
  };
  static constexpr std::array hyper_names{"lr",
                                          "betas[0]",
                                          "betas[1]",
                                          "eps",
                                          "weight_decay",
                                          "amsgrad!",
                                          "decoupled_weight_decay!",
                                          "cautious?",
                                          "cautious_weight_decay?"};
  static constexpr std::array state_names{"exp_avg", "exp_avg_sq", "max_exp_avg_sq"};
  static constexpr std::array state_codings{Coding::signed_values, Coding::squares, Coding::squares};
  static constexpr unsigned kAverages = state_bit(state_names, "exp_avg") | state_bit(state_names, "exp_avg_sq");
  static constexpr unsigned kMaximum = state_bit(state_names, "max_exp_avg_sq");
  static constexpr std::array state_sets{kAverages, kAverages | kMaximum};
  static constexpr bool counts_steps = true;

  static unsigned states_used(const Hyper& h) { return kAverages | (h.amsgrad != 0.0 ? kMaximum : 0U); }
  static bool takes_sparse(const Hyper& h) { return h.decoupled_weight_decay != 0.0 && !takes_sums(h); }

  template <class T>
  struct Constants {
    T step_size, eps, weight_decay, decay;
    Average<T> average1;
    AverageOfSquares<T> average2;
    Caution<T> caution;
    Flag<T> amsgrad, coupled, decoupled;
  };

  template <class T>
  ONEPASS_SETUP static Constants<T> prepare(const Hyper& h, double step) {
    const Divisors d = divisors(h, step);
    const double root2 = std::sqrt(d.correction2);
    const bool decays = h.weight_decay != 0.0;
    const bool decoupled = h.decoupled_weight_decay != 0.0;
    return {.step_size = T(h.lr / d.correction1 * root2),
            .eps = T(h.eps * root2),
            .weight_decay = T(h.weight_decay),
            .decay = T(h.lr * h.weight_decay),
            .average1 = Average<T>(h.beta1),
            .average2 = AverageOfSquares<T>(h.beta2),
            .caution = Caution<T>(h.cautious, h.cautious_weight_decay),
            .amsgrad = Flag<T>(h.amsgrad != 0.0),
            .coupled = Flag<T>(decays && !decoupled),
            .decoupled = Flag<T>(decays && decoupled)};
  }

  // The set of states says whether there is a maximum. Without one, the compiler leaves it out.
  template <unsigned Set, class T>
  ONEPASS_INLINE static void settle(Constants<T>& c) {
    c.amsgrad = Flag<T>((Set & kMaximum) != 0);
  }

  template <class T>
  ONEPASS_INLINE static T change(const Constants<T>& c, T p, T& g, T& exp_avg, T& exp_avg_sq, T& max_exp_avg_sq) {
    g = g + c.weight_decay * only_if(c.coupled, p);
    exp_avg = c.average1(exp_avg, g);
    exp_avg_sq = c.average2(exp_avg_sq, g);
    max_exp_avg_sq = select(c.amsgrad, maximum(max_exp_avg_sq, exp_avg_sq), exp_avg_sq);
    return c.step_size * exp_avg / (square_root(max_exp_avg_sq) + c.eps);
  }

  template <class T>
  ONEPASS_INLINE static void update(const Constants<T>& c, T& p, T g, T& exp_avg, T& exp_avg_sq, T& max_exp_avg_sq) {
    const T u = change(c, p, g, exp_avg, exp_avg_sq, max_exp_avg_sq);
    p = p - (c.decay * only_if(c.decoupled & c.caution.decays(p, u), p) + c.caution(u, g));
  }
};

}  // namespace onepass::inline ONEPASS_TARGET
