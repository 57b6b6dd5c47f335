// What the tests share: every rule by its number, and the settings that the kernels are tested with.
#pragma once

#include <array>
#include <cstddef>
#include <span>
#include <stdexcept>
#include <string_view>
#include <vector>

#include "cpu/dispatch.h"
#include "cpu/job.h"
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
};

// Every rule stands here, each of its branches is taken by some row, and some rows leave a state unused.
inline constexpr Setting kSettings[] = {
    {"sgd, plain", RuleId::sgd, {0.1, 0.0, 0.0, 0.0, 0.0}, 2},
    {"sgd, first step", RuleId::sgd, {0.1, 0.9, 0.3, 0.01, 0.0}, 1},
    {"sgd, nesterov", RuleId::sgd, {0.1, 0.9, 0.3, 0.01, 1.0}, 2},
    {"adam", RuleId::adam, {0.01, 0.9, 0.999, 1e-8, 0.1, 0.0, 0.0}, 3},
    {"adam, amsgrad", RuleId::adam, {0.01, 0.9, 0.999, 1e-8, 0.0, 1.0, 0.0}, 3},
    {"adam, amsgrad, decoupled", RuleId::adam, {0.01, 0.9, 0.999, 1e-8, 0.1, 1.0, 1.0}, 7},
    {"lion", RuleId::lion, {0.01, 0.9, 0.99, 0.0}, 1},
    {"lion, decay", RuleId::lion, {0.01, 0.9, 0.99, 0.1}, 1},
    {"lion, small betas", RuleId::lion, {0.01, 0.4, 0.3, 0.0}, 1},
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

inline int states_used(const Setting& setting) { return info_of(setting.rule).states_used(setting.hyper.data()); }
inline std::size_t operands_of(const Setting& setting) {
  return static_cast<std::size_t>(kFirstState + states_used(setting));
}

// The instruction sets that can be tested on this machine.
inline std::vector<Isa> supported_isas() {
  std::vector<Isa> isas;
  for (const Isa& isa : compiled_isas())
    if (isa.supported()) isas.push_back(isa);
  return isas;
}

}  // namespace onepass::testing
