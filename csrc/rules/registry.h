// The list of all element-wise rules. The kernels, the dispatch tables, the bindings and parts of the tests are
// generated from it, so none of them can lack a rule that is listed here.
#pragma once

// X(name, Type): the rule's name in Python, and the struct in its header.
#define ONEPASS_RULES(X)                    \
  X(adabelief, AdaBelief)                   \
  X(adadelta, Adadelta)                     \
  X(adagrad, Adagrad)                       \
  X(adam, Adam)                             \
  X(adamax, Adamax)                         \
  X(adan, Adan)                             \
  X(ademamix, AdEMAMix)                     \
  X(adopt, Adopt)                           \
  X(asgd, Asgd)                             \
  X(lamb, Lamb)                             \
  X(laprop, LaProp)                         \
  X(lars, Lars)                             \
  X(lion, Lion)                             \
  X(mars, Mars)                             \
  X(muon, Muon)                             \
  X(muon_momentum, MuonMomentum)            \
  X(nadam, Nadam)                           \
  X(novograd, NovoGrad)                     \
  X(prodigy, Prodigy)                       \
  X(radam, Radam)                           \
  X(rmsprop, Rmsprop)                       \
  X(rprop, Rprop)                           \
  X(schedule_free_adamw, ScheduleFreeAdamW) \
  X(schedule_free_radam, ScheduleFreeRadam) \
  X(schedule_free_sgd, ScheduleFreeSgd)     \
  X(sgd, Sgd)                               \
  X(signum, Signum)                         \
  X(sparse_adam, SparseAdam)                \
  X(stable_adamw, StableAdamW)

#include <cstdint>

namespace onepass {

enum class RuleId : int {
#define ONEPASS_X(name, Type) name,
  ONEPASS_RULES(ONEPASS_X)
#undef ONEPASS_X
};

inline constexpr int kRules = 0
#define ONEPASS_X(name, Type) +1
    ONEPASS_RULES(ONEPASS_X)
#undef ONEPASS_X
    ;

inline constexpr int kBlockLength = 32;  // elements of an 8-bit state that share a scale

// How a state is stored in 8 bits (formats/microscaling.h).
enum class Coding : std::uint8_t {
  none,           // not in 8 bits: the state is not an average
  signed_values,  // by its value
  magnitudes,     // by its value, which is not negative, and which a step divides by
  squares,        // by its root, which a step divides by
};

constexpr const char* name_of(Coding coding) {
  switch (coding) {
    case Coding::none:
      return "none";
    case Coding::signed_values:
      return "signed_values";
    case Coding::magnitudes:
      return "magnitudes";
    case Coding::squares:
      return "squares";
  }
  return "?";
}

inline constexpr int kMaxStates = 4;           // state tensors of one rule
inline constexpr int kMaxSums = 2;             // sums over a whole tensor that the update of one rule depends on
inline constexpr int kMaxScalars = 2;          // scalars that one rule keeps for each parameter, beside its step
inline constexpr int kMaxHyper = 16;           // hyperparameters of one rule
inline constexpr int kMaxConstantBytes = 256;  // a rule's `Constants`

}  // namespace onepass
