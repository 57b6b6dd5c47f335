// What the tests share: every rule by its number, and the settings that the kernels are tested with.
#pragma once

#include <array>
#include <cstddef>
#include <span>
#include <stdexcept>
#include <string_view>
#include <vector>

#include "cpu/dispatch.h"
#include "job.h"
#include "rules/all.h"
#include "rules/table.h"

namespace onepass::testing {

// Calls visit.operator()<Rule>() with the struct of this rule.
template <class Visit>
decltype(auto) with_rule(RuleId rule, Visit&& visit) {
  switch (rule) {
#define ONEPASS_X(name, Type) \
  case RuleId::name:          \
    return visit.template operator()<Type>();
    ONEPASS_RULES(ONEPASS_X)
#undef ONEPASS_X
  }
  throw std::logic_error("no such rule");
}

struct Setting {
  std::string_view what;
  RuleId rule;
  std::array<double, kMaxHyper> hyper;  // in the order of hyper_names
  double step;
  std::array<double, kMaxScalars> scalars{};  // in the order of scalar_names, as the last step left them
};

// Every rule stands here, each of its branches is taken by some row, and some rows leave a state unused.
inline constexpr Setting kSettings[] = {
    {"adadelta", RuleId::adadelta, {0.5, 0.9, 1e-6, 0.0}, 3},
    {"adadelta, decay", RuleId::adadelta, {1.0, 0.8, 1e-3, 0.1}, 3},
    {"adagrad", RuleId::adagrad, {0.01, 0.0, 1e-10, 0.0, 0.0}, 3},
    {"adagrad, decay", RuleId::adagrad, {0.01, 0.2, 1e-3, 0.1, 0.0}, 4},
    {"adagrad, decoupled", RuleId::adagrad, {0.01, 0.2, 1e-3, 0.1, 1.0}, 4},
    {"adam", RuleId::adam, {0.01, 0.9, 0.999, 1e-8, 0.1, 0.0, 0.0}, 3},
    {"adam, amsgrad", RuleId::adam, {0.01, 0.9, 0.999, 1e-8, 0.0, 1.0, 0.0}, 3},
    {"adam, amsgrad, decoupled", RuleId::adam, {0.01, 0.9, 0.999, 1e-8, 0.1, 1.0, 1.0}, 7},
    {"adamax", RuleId::adamax, {0.01, 0.9, 0.999, 1e-8, 0.0}, 3},
    {"adamax, decay", RuleId::adamax, {0.01, 0.4, 0.9, 0.1, 0.1}, 3},
    {"asgd", RuleId::asgd, {0.01, 1e-4, 0.75, 1e6, 0.0}, 3, {0.009, 1.0}},
    {"asgd, averaging, decay", RuleId::asgd, {0.01, 0.1, 0.5, 2.0, 0.1}, 7, {0.008, 0.25}},
    {"lion", RuleId::lion, {0.01, 0.9, 0.99, 0.0}, 1},
    {"lion, decay", RuleId::lion, {0.01, 0.9, 0.99, 0.1}, 1},
    {"lion, small betas", RuleId::lion, {0.01, 0.4, 0.3, 0.0}, 1},
    {"muon", RuleId::muon, {0.0, 0.02}, 1},
    {"muon, decay", RuleId::muon, {0.01, 0.02}, 1},
    {"muon_momentum", RuleId::muon_momentum, {0.9, 0.0}, 1},
    {"muon_momentum, nesterov", RuleId::muon_momentum, {0.9, 1.0}, 1},
    {"muon_momentum, nesterov, small", RuleId::muon_momentum, {0.3, 1.0}, 1},
    {"nadam", RuleId::nadam, {0.01, 0.9, 0.999, 1e-8, 0.0, 4e-3, 0.0}, 3, {0.2}},
    {"nadam, decay", RuleId::nadam, {0.01, 0.9, 0.99, 1e-8, 0.1, 0.1, 0.0}, 3, {0.2}},
    {"nadam, decoupled", RuleId::nadam, {0.01, 0.9, 0.99, 1e-8, 0.1, 0.1, 1.0}, 3, {0.2}},
    {"radam, not yet adaptive", RuleId::radam, {0.01, 0.9, 0.999, 1e-8, 0.1, 0.0}, 5},
    {"radam", RuleId::radam, {0.01, 0.9, 0.999, 1e-8, 0.0, 0.0}, 6},
    {"radam, decoupled", RuleId::radam, {0.01, 0.9, 0.99, 1e-3, 0.1, 1.0}, 40},
    {"rmsprop", RuleId::rmsprop, {0.01, 0.99, 1e-8, 0.0, 0.0, 0.0}, 3},
    {"rmsprop, momentum", RuleId::rmsprop, {0.01, 0.99, 1e-8, 0.1, 0.9, 0.0}, 3},
    {"rmsprop, centered", RuleId::rmsprop, {0.01, 0.99, 1e-3, 0.0, 0.0, 1.0}, 3},
    {"rmsprop, centered, momentum", RuleId::rmsprop, {0.01, 0.9, 1e-3, 0.1, 0.9, 1.0}, 3},
    {"rprop", RuleId::rprop, {0.5, 1.2, 1e-6, 50.0}, 3},
    {"rprop, narrow", RuleId::rprop, {0.3, 1.5, 0.1, 0.5}, 3},
    {"sgd, plain", RuleId::sgd, {0.1, 0.0, 0.0, 0.0, 0.0}, 2},
    {"sgd, first step", RuleId::sgd, {0.1, 0.9, 0.3, 0.01, 0.0}, 1},
    {"sgd, nesterov", RuleId::sgd, {0.1, 0.9, 0.3, 0.01, 1.0}, 2},
    {"sparse_adam", RuleId::sparse_adam, {0.01, 0.9, 0.999, 1e-8}, 3},
};

inline const Setting& setting_of(std::string_view what) {
  for (const Setting& setting : kSettings)
    if (setting.what == what) return setting;
  throw std::logic_error("no such setting");
}

// A rule's `Constants`, made as the bindings make them.
class Constants {
 public:
  Constants(const Setting& setting, bool wide) {
    info_of(setting.rule).prepare(setting.hyper.data(), setting.step, setting.scalars.data(), wide, bytes_.data());
  }
  const void* data() const { return bytes_.data(); }
  template <class Type>
  const Type& as() const {
    return *static_cast<const Type*>(data());
  }

 private:
  alignas(std::max_align_t) std::array<std::byte, kMaxConstantBytes> bytes_{};
};

inline unsigned states_used(const Setting& setting) { return info_of(setting.rule).states_used(setting.hyper.data()); }

// Parameter, gradient and all states that the rule can have; a setting may leave some of these out.
inline std::size_t operands_of(const Setting& setting) {
  return kFirstState + info_of(setting.rule).state_names.size();
}
inline bool uses(const Setting& setting, std::size_t operand) {
  return operand < kFirstState || (states_used(setting) >> (operand - kFirstState) & 1U) != 0;
}

// The instruction sets that can be tested on this machine.
inline std::vector<Isa> supported_isas() {
  std::vector<Isa> isas;
  for (const Isa& isa : compiled_isas())
    if (isa.supported()) isas.push_back(isa);
  return isas;
}

}  // namespace onepass::testing
