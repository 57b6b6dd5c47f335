// Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/; learning rate by shape: Liu et al. 2025,
// arXiv:2502.16982). Two rules, with torch's matrix products between them:
//
//   muon_momentum:  buf = momentum * buf + (1 - momentum) * g
//                   u   = (1 - momentum) * g + momentum * buf   with nesterov, else buf
//                   O   = u with its singular values brought near one, by Newton-Schulz iterations
//   muon:           p   = p - (lr * weight_decay * p + adjusted_lr * O)
#pragma once

#include <array>

#include "rules/cautious.h"
#include "rules/math.h"
#include "rules/registry.h"
#include "rules/states.h"
#include "target.h"

namespace onepass::inline ONEPASS_TARGET {

// Its operand kParam is u.
struct MuonMomentum {
  static constexpr RuleId id = RuleId::muon_momentum;

  struct Hyper {
    double momentum, nesterov;
  };
  static constexpr std::array hyper_names{"momentum", "nesterov!"};
  static constexpr std::array state_names{"momentum_buffer"};
  static constexpr std::array state_sets{all_states(state_names)};
  static constexpr bool counts_steps = false;

  static unsigned states_used(const Hyper&) { return all_states(state_names); }

  template <class T>
  struct Constants {
    Average<T> average, lookahead;
    Flag<T> nesterov;
  };

  template <class T>
  ONEPASS_SETUP static Constants<T> prepare(const Hyper& h, double /*step*/) {
    return {.average = Average<T>(h.momentum),
            .lookahead = Average<T>(1.0 - h.momentum),
            .nesterov = Flag<T>(h.nesterov != 0.0)};
  }

  template <class T>
  ONEPASS_INLINE static void update(const Constants<T>& c, T& u, T g, T& momentum_buffer) {
    momentum_buffer = c.average(momentum_buffer, g);
    u = select(c.nesterov, c.lookahead(g, momentum_buffer), momentum_buffer);
  }
};

// Its operand kGrad is O.
struct Muon {
  static constexpr RuleId id = RuleId::muon;

  struct Hyper {
    double decay, adjusted_lr, cautious_weight_decay;  // lr * weight_decay, and lr adjusted for this shape
  };
  static constexpr std::array hyper_names{"decay", "adjusted_lr", "cautious_weight_decay?"};
  static constexpr std::array<const char*, 0> state_names{};
  static constexpr std::array state_sets{all_states(state_names)};
  static constexpr bool counts_steps = false;

  static unsigned states_used(const Hyper&) { return all_states(state_names); }

  template <class T>
  struct Constants {
    T decay, adjusted_lr;
    Caution<T> caution;
    Flag<T> decays;
  };

  template <class T>
  ONEPASS_SETUP static Constants<T> prepare(const Hyper& h, double /*step*/) {
    return {.decay = T(h.decay),
            .adjusted_lr = T(h.adjusted_lr),
            .caution = Caution<T>(-1.0, h.cautious_weight_decay),
            .decays = Flag<T>(h.decay != 0.0)};
  }

  template <class T>
  ONEPASS_INLINE static void update(const Constants<T>& c, T& p, T ortho) {
    const T u = c.adjusted_lr * ortho;
    p = p - (c.decay * only_if(c.decays & c.caution.decays(p, u), p) + u);
  }
};

}  // namespace onepass::inline ONEPASS_TARGET
