// Two options of rules with a momentum. Let u be what the rule subtracts from p, without a decoupled weight decay:
//
//   cautious (Liang et al. 2024, arXiv:2411.16085, algorithm 1): u becomes 0 unless u * g > 0. The remaining elements,
//   k of the tensor's n, are multiplied by n / max(k, n / 1000), the factor of the authors' code; the paper has
//   n / (k + 1). g includes a coupled weight decay.
//
//   cautious_weight_decay (Chen et al. 2025, arXiv:2510.12402, algorithm 1): a decoupled weight decay is left out where
//   u * p < 0.
#pragma once

#include <cstddef>

#include "rules/math.h"
#include "target.h"

namespace onepass::inline ONEPASS_TARGET {

template <class T>
class Caution {
 public:
  // Without masks.
  ONEPASS_INLINE Caution() : keeps_all_(true), decays_everywhere_(true) {}

  ONEPASS_SETUP explicit Caution(double cautious, double cautious_weight_decay = -1.0)
      : keeps_all_(!(cautious > 0.0)), decays_everywhere_(!(cautious_weight_decay > 0.0)) {}

  ONEPASS_INLINE bool masks() const { return !keeps_all_.is_set() || !decays_everywhere_.is_set(); }

  // Sets the factor of the elements that remain, k of n.
  ONEPASS_SETUP void rescale(double k, double n) { factor_ = T(n / (k > 1e-3 * n ? k : 1e-3 * n)); }

  // Returns the change, scaled or zero. NaN stays NaN.
  ONEPASS_INLINE T operator()(T change, T g) const { return only_if(agree(change, g) | keeps_all_, factor_) * change; }

  // Whether a parameter decays. Zero may do so in Adan, which decays the updated parameter.
  ONEPASS_INLINE Flag<T> decays(T p, T change) const {
    return Flag<T>::same_sign(p, change) | Flag<T>(change == T(0)) | Flag<T>(p == T(0)) | decays_everywhere_;
  }

  // Whether change * g > 0, also where the product would be rounded to zero. A change of zero has any answer.
  ONEPASS_INLINE static Flag<T> agree(T change, T g) { return Flag<T>::same_sign(change, g) & Flag<T>(g != T(0)); }

 private:
  T factor_ = T(1);
  Flag<T> keeps_all_, decays_everywhere_;
};

// A rule that is derived from this has the sum of `cautious`: how many elements remain. Its hyperparameters include
// `cautious`, its constants `caution`, and `change(constants, p, g, states...)` returns u, adds a coupled weight decay
// to g, and replaces the states.
template <class Rule>
struct Cautious {
  static constexpr std::size_t sums = 1;

  template <class Hyper>
  static bool takes_sums(const Hyper& h) {
    return h.cautious > 0.0;
  }

  template <std::size_t /*which*/, class Constants, class T, class... States>
  ONEPASS_INLINE static double summed(const Constants& c, T p, T g, States... states) {
    const T change = Rule::change(c, p, g, states...);
    return double{only_if(Caution<T>::agree(change, g) & Flag<T>(magnitude(change) > T(0)), T(1))};
  }

  template <class Constants>
  ONEPASS_SETUP static void use_sums(Constants& c, const double* found, double elements) {
    c.caution.rescale(found[0], elements);
  }

 private:
  friend Rule;
  Cautious() = default;
};

}  // namespace onepass::inline ONEPASS_TARGET
