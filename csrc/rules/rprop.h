// Rprop (Riedmiller and Braun 1993, in the variant without weight backtracking, Igel and Huesken 2003: iRprop-):
//
//   f         = etas[1], etas[0] or 1     if g and prev have the same sign, opposite signs, or one is zero
//   step_size = f * step_size             within step_sizes[0] and step_sizes[1]
//   g'        = 0 after a change of sign, else g
//   p         = p - sign(g') * step_size
//   prev      = g'
//
// The sign of NaN is taken as zero, as in torch.
#pragma once

#include <array>

#include "rules/math.h"
#include "rules/registry.h"
#include "rules/states.h"
#include "target.h"

namespace onepass::inline ONEPASS_TARGET {

struct Rprop {
  static constexpr RuleId id = RuleId::rprop;

  struct Hyper {
    double eta_minus, eta_plus, smallest, largest;
  };
  static constexpr std::array hyper_names{"etas[0]", "etas[1]", "step_sizes[0]", "step_sizes[1]"};
  static constexpr std::array state_names{"prev", "step_size"};
  static constexpr std::array state_sets{all_states(state_names)};
  static constexpr bool counts_steps = true;

  static unsigned states_used(const Hyper&) { return all_states(state_names); }

  template <class T>
  struct Constants {
    T eta_minus, eta_plus, smallest, largest;
  };

  template <class T>
  ONEPASS_SETUP static Constants<T> prepare(const Hyper& h, double /*step*/) {
    return {.eta_minus = T(h.eta_minus), .eta_plus = T(h.eta_plus), .smallest = T(h.smallest), .largest = T(h.largest)};
  }

  template <class T>
  ONEPASS_INLINE static void update(const Constants<T>& c, T& p, T g, T& prev, T& step_size) {
    // Not every processor compares a loaded denormal as zero. The addition flushes it.
    const T last = prev + T(0);
    const T before = choose(magnitude(last) > T(0), with_sign_of(last, T(1)), T(0));
    const T now = choose(magnitude(g) > T(0), with_sign_of(g, T(1)), T(0));
    const T agreement = before * now;  // of signs, because the product of the gradients might underflow
    const T growth = choose(agreement > T(0), c.eta_plus, T(1));
    const T size = step_size * choose(agreement < T(0), c.eta_minus, growth);
    const T raised = size < c.smallest ? c.smallest : size;
    step_size = raised > c.largest ? c.largest : raised;
    // Multiplied by zero, not skipped: a denormal p would not be flushed where a compiler branches around the
    // arithmetic.
    p = p - choose(agreement < T(0), T(0), now) * step_size;
    prev = choose(agreement < T(0), T(0), g);
  }
};

}  // namespace onepass::inline ONEPASS_TARGET
