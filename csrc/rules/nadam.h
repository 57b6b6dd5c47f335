// NAdam (Dozat 2016, "Incorporating Nesterov momentum into Adam"), at step t:
//
//   g'   = g + weight_decay * p               unless the decay is decoupled
//   mu_t = beta1 * (1 - 0.96^(t * momentum_decay) / 2)
//   M_t  = mu_1 * ... * mu_t                  the scalar mu_product
//   m    = beta1 * m + (1 - beta1) * g'
//   v    = beta2 * v + (1 - beta2) * g'^2
//   n    = mu_(t+1) / (1 - M_t * mu_(t+1)) * m + (1 - mu_t) / (1 - M_t) * g'
//   p    = p - lr * weight_decay * p          if the decay is decoupled
//            - lr * n / (sqrt(v / (1 - beta2^t)) + eps)
//
// As in adam.h, the bias correction of v is moved into the constants.
#pragma once

#include <array>
#include <cmath>

#include "rules/cautious.h"
#include "rules/math.h"
#include "rules/registry.h"
#include "rules/states.h"
#include "target.h"

namespace onepass::inline ONEPASS_TARGET {

struct Nadam : Cautious<Nadam> {
  static constexpr RuleId id = RuleId::nadam;

  struct Hyper {
    double lr, beta1, beta2, eps, weight_decay, momentum_decay, decoupled_weight_decay, cautious, cautious_weight_decay;
  };
  static constexpr std::array hyper_names{"lr",
                                          "betas[0]",
                                          "betas[1]",
                                          "eps",
                                          "weight_decay",
                                          "momentum_decay",
                                          "decoupled_weight_decay!",
                                          "cautious?",
                                          "cautious_weight_decay?"};
  static constexpr std::array state_names{"exp_avg", "exp_avg_sq"};
  static constexpr std::array state_codings{Coding::signed_values, Coding::squares};
  static constexpr std::array state_sets{all_states(state_names)};
  static constexpr bool counts_steps = true;

  struct Scalars {
    double mu_product;
  };
  static constexpr std::array scalar_names{"mu_product"};

  static unsigned states_used(const Hyper&) { return all_states(state_names); }

  struct Divisors {
    double rest, rest_next, correction2;
  };
  static constexpr std::array divisor_names{"1 - mu_product", "1 - mu_product * mu_next", "1 - betas[1] ** step"};
  ONEPASS_SETUP static Divisors divisors(const Hyper& h, double step, const Scalars& before) {
    const double product = advance(h, step, before).mu_product;
    return {.rest = 1.0 - product,
            .rest_next = 1.0 - product * mu(h, step + 1.0),
            .correction2 = 1.0 - std::pow(h.beta2, step)};
  }

  template <class T>
  struct Constants {
    T grad_share, avg_share, eps, weight_decay, decay;
    Average<T> average1;
    AverageOfSquares<T> average2;
    Caution<T> caution;
    Flag<T> coupled, decoupled;
  };

  template <class T>
  ONEPASS_SETUP static Constants<T> prepare(const Hyper& h, double step, const Scalars& s) {
    const Divisors d = divisors(h, step, s);
    const double root2 = std::sqrt(d.correction2);
    const bool decays = h.weight_decay != 0.0;
    const bool decoupled = h.decoupled_weight_decay != 0.0;
    return {.grad_share = T(h.lr * (1.0 - mu(h, step)) / d.rest * root2),
            .avg_share = T(h.lr * mu(h, step + 1.0) / d.rest_next * root2),
            .eps = T(h.eps * root2),
            .weight_decay = T(h.weight_decay),
            .decay = T(h.lr * h.weight_decay),
            .average1 = Average<T>(h.beta1),
            .average2 = AverageOfSquares<T>(h.beta2),
            .caution = Caution<T>(h.cautious, h.cautious_weight_decay),
            .coupled = Flag<T>(decays && !decoupled),
            .decoupled = Flag<T>(decays && decoupled)};
  }

  ONEPASS_SETUP static Scalars advance(const Hyper& h, double step, const Scalars& before) {
    return {.mu_product = before.mu_product * mu(h, step)};
  }

  template <class T>
  ONEPASS_INLINE static T change(const Constants<T>& c, T p, T& g, T& exp_avg, T& exp_avg_sq) {
    g = g + c.weight_decay * only_if(c.coupled, p);
    exp_avg = c.average1(exp_avg, g);
    exp_avg_sq = c.average2(exp_avg_sq, g);
    return (c.avg_share * exp_avg + c.grad_share * g) / (square_root(exp_avg_sq) + c.eps);
  }

  template <class T>
  ONEPASS_INLINE static void update(const Constants<T>& c, T& p, T g, T& exp_avg, T& exp_avg_sq) {
    const T u = change(c, p, g, exp_avg, exp_avg_sq);
    p = p - (c.decay * only_if(c.decoupled & c.caution.decays(p, u), p) + c.caution(u, g));
  }

 private:
  ONEPASS_SETUP static double mu(const Hyper& h, double step) {
    return h.beta1 * (1.0 - 0.5 * std::pow(0.96, step * h.momentum_decay));
  }
};

}  // namespace onepass::inline ONEPASS_TARGET
