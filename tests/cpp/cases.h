// What the tests share: a visitor of the rules, and the settings that the kernels are tested with.
#pragma once

#include <algorithm>
#include <array>
#include <bit>
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
  std::array<double, kMaxHyper> hyper{};  // in the order of hyper_names
  double step = 1.0;
  std::array<double, kMaxScalars> scalars{};  // in the order of scalar_names, after the last step
};

// Returns the members of a struct of doubles, in their order.
template <std::size_t Count, class Named>
constexpr std::array<double, Count> doubles_of(const Named& named) {
  const auto values = std::bit_cast<std::array<double, sizeof(Named) / sizeof(double)>>(named);
  std::array<double, Count> all{};
  std::ranges::copy(values, all.begin());
  return all;
}

// Hyperparameters that are not named are zero.
template <class Rule>
constexpr Setting make_setting(std::string_view what, const typename Rule::Hyper& hyper, double step) {
  return {.what = what, .rule = Rule::id, .hyper = doubles_of<kMaxHyper>(hyper), .step = step};
}
template <class Rule>
constexpr Setting make_setting(std::string_view what, const typename Rule::Hyper& hyper, double step,
                               const typename Rule::Scalars& scalars) {
  Setting setting = make_setting<Rule>(what, hyper, step);
  setting.scalars = doubles_of<kMaxScalars>(scalars);
  return setting;
}

// Every rule is here. The rows of a rule take each of its branches and have each of its state sets. bench/kernels.cpp
// times the row with the rule's name.
inline constexpr Setting kSettings[] = {
    make_setting<AdaBelief>("adabelief", {.lr = 0.01, .beta1 = 0.9, .beta2 = 0.999, .eps = 1e-8}, 3),
    make_setting<AdaBelief>("adabelief, decay",
                            {.lr = 0.01, .beta1 = 0.4, .beta2 = 0.9, .eps = 1e-3, .weight_decay = 0.1}, 3),
    make_setting<AdaBelief>("adabelief, cautious",
                            {.lr = 0.01,
                             .beta1 = 0.9,
                             .beta2 = 0.9,
                             .eps = 1e-3,
                             .weight_decay = 0.1,
                             .cautious = 1,
                             .cautious_weight_decay = 1},
                            3),
    make_setting<Adadelta>("adadelta", {.lr = 0.5, .rho = 0.9, .eps = 1e-6}, 3),
    make_setting<Adadelta>("adadelta, decay", {.lr = 1.0, .rho = 0.8, .eps = 1e-3, .weight_decay = 0.1}, 3),
    make_setting<Adagrad>("adagrad", {.lr = 0.01, .eps = 1e-10}, 3),
    make_setting<Adagrad>("adagrad, decay", {.lr = 0.01, .lr_decay = 0.2, .eps = 1e-3, .weight_decay = 0.1}, 4),
    make_setting<Adagrad>(
        "adagrad, decoupled",
        {.lr = 0.01, .lr_decay = 0.2, .eps = 1e-3, .weight_decay = 0.1, .decoupled_weight_decay = 1.0}, 4),
    make_setting<Adam>("adam", {.lr = 0.01, .beta1 = 0.9, .beta2 = 0.999, .eps = 1e-8, .weight_decay = 0.1}, 3),
    make_setting<Adam>("adam, amsgrad", {.lr = 0.01, .beta1 = 0.9, .beta2 = 0.999, .eps = 1e-8, .amsgrad = 1.0}, 3),
    make_setting<Adam>("adam, amsgrad, decoupled",
                       {.lr = 0.01,
                        .beta1 = 0.9,
                        .beta2 = 0.999,
                        .eps = 1e-8,
                        .weight_decay = 0.1,
                        .amsgrad = 1.0,
                        .decoupled_weight_decay = 1.0},
                       7),
    make_setting<Adam>("adam, cautious",
                       {.lr = 0.01, .beta1 = 0.9, .beta2 = 0.9, .eps = 1e-3, .weight_decay = 0.1, .cautious = 1}, 3),
    make_setting<Adam>("adam, decoupled, cautious",
                       {.lr = 0.01,
                        .beta1 = 0.9,
                        .beta2 = 0.9,
                        .eps = 1e-3,
                        .weight_decay = 0.1,
                        .decoupled_weight_decay = 1,
                        .cautious = 1,
                        .cautious_weight_decay = 1},
                       3),
    make_setting<Adam>("adam, decoupled, cautious decay",
                       {.lr = 0.01,
                        .beta1 = 0.9,
                        .beta2 = 0.9,
                        .eps = 1e-3,
                        .weight_decay = 0.1,
                        .decoupled_weight_decay = 1,
                        .cautious_weight_decay = 1},
                       3),
    make_setting<Adamax>("adamax", {.lr = 0.01, .beta1 = 0.9, .beta2 = 0.999, .eps = 1e-8}, 3),
    make_setting<Adamax>("adamax, decay", {.lr = 0.01, .beta1 = 0.4, .beta2 = 0.9, .eps = 0.1, .weight_decay = 0.1}, 3),
    make_setting<Adamax>("adamax, cautious",
                         {.lr = 0.01, .beta1 = 0.9, .beta2 = 0.9, .eps = 1e-3, .weight_decay = 0.1, .cautious = 1}, 3),
    make_setting<Adan>("adan", {.lr = 0.01, .beta1 = 0.98, .beta2 = 0.92, .beta3 = 0.99, .eps = 1e-8}, 3),
    make_setting<Adan>("adan, first step, decay",
                       {.lr = 0.01, .beta1 = 0.9, .beta2 = 0.4, .beta3 = 0.9, .eps = 1e-3, .weight_decay = 0.1}, 1),
    make_setting<Adan>(
        "adan, no_prox",
        {.lr = 0.01, .beta1 = 0.9, .beta2 = 0.8, .beta3 = 0.9, .eps = 1e-3, .weight_decay = 0.1, .no_prox = 1.0}, 4),
    make_setting<Adan>("adan, cautious",
                       {.lr = 0.01,
                        .beta1 = 0.9,
                        .beta2 = 0.8,
                        .beta3 = 0.9,
                        .eps = 1e-3,
                        .weight_decay = 0.1,
                        .cautious = 1,
                        .cautious_weight_decay = 1},
                       3),
    make_setting<Adan>("adan, no_prox, cautious",
                       {.lr = 0.01,
                        .beta1 = 0.9,
                        .beta2 = 0.8,
                        .beta3 = 0.9,
                        .eps = 1e-3,
                        .weight_decay = 0.1,
                        .no_prox = 1,
                        .cautious = 1,
                        .cautious_weight_decay = 1},
                       3),
    make_setting<AdEMAMix>("ademamix",
                           {.lr = 0.01,
                            .beta1 = 0.9,
                            .beta2 = 0.999,
                            .beta3 = 0.9999,
                            .alpha = 5.0,
                            .beta3_warmup = -1.0,
                            .alpha_warmup = -1.0,
                            .eps = 1e-8},
                           3),
    make_setting<AdEMAMix>("ademamix, warm-up, decay",
                           {.lr = 0.01,
                            .beta1 = 0.4,
                            .beta2 = 0.99,
                            .beta3 = 0.999,
                            .alpha = 2.0,
                            .beta3_warmup = 10.0,
                            .alpha_warmup = 7.0,
                            .eps = 1e-3,
                            .weight_decay = 0.1},
                           3),
    make_setting<AdEMAMix>("ademamix, cautious",
                           {.lr = 0.01,
                            .beta1 = 0.9,
                            .beta2 = 0.9,
                            .beta3 = 0.99,
                            .alpha = 2,
                            .beta3_warmup = -1,
                            .alpha_warmup = -1,
                            .eps = 1e-3,
                            .weight_decay = 0.1,
                            .cautious = 1,
                            .cautious_weight_decay = 1},
                           3),
    make_setting<Adopt>("adopt", {.lr = 0.01, .beta1 = 0.9, .beta2 = 0.9999, .eps = 1e-6, .clip_exponent = 0.25}, 5),
    make_setting<Adopt>(
        "adopt, first step, decay",
        {.lr = 0.01, .beta1 = 0.9, .beta2 = 0.99, .eps = 1e-6, .weight_decay = 0.1, .clip_exponent = 0.25}, 1),
    make_setting<Adopt>("adopt, decoupled, not clipped",
                        {.lr = 0.01,
                         .beta1 = 0.4,
                         .beta2 = 0.99,
                         .eps = 1e-3,
                         .weight_decay = 0.1,
                         .clip_exponent = -1.0,
                         .decoupled_weight_decay = 1.0},
                        4),
    make_setting<Adopt>("adopt, cautious",
                        {.lr = 0.01,
                         .beta1 = 0.9,
                         .beta2 = 0.9,
                         .eps = 1e-3,
                         .weight_decay = 0.1,
                         .clip_exponent = 0.25,
                         .decoupled_weight_decay = 1,
                         .cautious = 1,
                         .cautious_weight_decay = 1},
                        4),
    make_setting<Asgd>("asgd", {.lr = 0.01, .lambd = 1e-4, .alpha = 0.75, .t0 = 1e6}, 3, {.eta = 0.009, .mu = 1.0}),
    make_setting<Asgd>("asgd, averaging, decay",
                       {.lr = 0.01, .lambd = 0.1, .alpha = 0.5, .t0 = 2.0, .weight_decay = 0.1}, 7,
                       {.eta = 0.008, .mu = 0.25}),
    make_setting<Lamb>(
        "lamb", {.lr = 0.01, .beta1 = 0.9, .beta2 = 0.999, .eps = 1e-6, .weight_decay = 0.01, .trust_ratio = 1.0}, 3),
    make_setting<Lamb>("lamb, clipped",
                       {.lr = 0.01, .beta1 = 0.4, .beta2 = 0.9, .eps = 1e-3, .trust_ratio = 1.0, .trust_clip = 1.0}, 3),
    make_setting<Lamb>("lamb, no ratio", {.lr = 0.01, .beta1 = 0.9, .beta2 = 0.99, .eps = 1e-6, .weight_decay = 0.1},
                       3),
    make_setting<LaProp>("laprop", {.lr = 0.01, .beta1 = 0.9, .beta2 = 0.999, .eps = 1e-8}, 3),
    make_setting<LaProp>("laprop, decay", {.lr = 0.01, .beta1 = 0.4, .beta2 = 0.9, .eps = 1e-3, .weight_decay = 0.1},
                         3),
    make_setting<LaProp>("laprop, cautious",
                         {.lr = 0.01,
                          .beta1 = 0.9,
                          .beta2 = 0.9,
                          .eps = 1e-3,
                          .weight_decay = 0.1,
                          .cautious = 1,
                          .cautious_weight_decay = 1},
                         3),
    make_setting<Lars>("lars", {.lr = 0.5, .momentum = 0.9, .trust_coefficient = 0.01, .eps = 1e-8, .trust_ratio = 1.0},
                       1),
    make_setting<Lars>("lars, nesterov, decay",
                       {.lr = 0.5,
                        .momentum = 0.8,
                        .weight_decay = 0.1,
                        .trust_coefficient = 0.01,
                        .eps = 1e-3,
                        .nesterov = 1.0,
                        .trust_ratio = 1.0},
                       1),
    make_setting<Lars>("lars, no momentum, no ratio", {.lr = 0.1, .weight_decay = 0.1}, 1),
    make_setting<Lion>("lion", {.lr = 0.01, .beta1 = 0.9, .beta2 = 0.99}, 1),
    make_setting<Lion>("lion, decay", {.lr = 0.01, .beta1 = 0.9, .beta2 = 0.99, .weight_decay = 0.1}, 1),
    make_setting<Lion>("lion, small betas", {.lr = 0.01, .beta1 = 0.4, .beta2 = 0.3}, 1),
    make_setting<Lion>(
        "lion, cautious",
        {.lr = 0.01, .beta1 = 0.9, .beta2 = 0.99, .weight_decay = 0.1, .cautious = 1, .cautious_weight_decay = 1}, 1),
    make_setting<Muon>("muon", {.adjusted_lr = 0.02}, 1),
    make_setting<Muon>("muon, decay", {.decay = 0.01, .adjusted_lr = 0.02}, 1),
    make_setting<Muon>("muon, cautious decay", {.decay = 0.01, .adjusted_lr = 0.02, .cautious_weight_decay = 1}, 1),
    make_setting<MuonMomentum>("muon_momentum", {.momentum = 0.9}, 1),
    make_setting<MuonMomentum>("muon_momentum, nesterov", {.momentum = 0.9, .nesterov = 1.0}, 1),
    make_setting<MuonMomentum>("muon_momentum, nesterov, small", {.momentum = 0.3, .nesterov = 1.0}, 1),
    make_setting<Mars>("mars",
                       {.lr = 0.01,
                        .beta1 = 0.95,
                        .beta2 = 0.99,
                        .eps = 1e-8,
                        .weight_decay = 0.1,
                        .gamma = 0.025,
                        .clip_correction = 1},
                       3),
    make_setting<Mars>("mars, not clipped", {.lr = 0.01, .beta1 = 0.4, .beta2 = 0.9, .eps = 1e-3, .gamma = 0.5}, 3),
    make_setting<Mars>("mars, first step",
                       {.lr = 0.01, .beta1 = 0.9, .beta2 = 0.99, .eps = 1e-8, .gamma = 0.1, .clip_correction = 1}, 1),
    make_setting<NovoGrad>("novograd", {.lr = 0.01, .beta1 = 0.95, .beta2 = 0.98, .eps = 1e-8, .weight_decay = 0.01}, 3,
                           {.exp_avg_norm_sq = 0.5}),
    make_setting<NovoGrad>("novograd, averaging",
                           {.lr = 0.01, .beta1 = 0.4, .beta2 = 0.9, .eps = 1e-3, .grad_averaging = 1}, 3,
                           {.exp_avg_norm_sq = 2.0}),
    make_setting<NovoGrad>("novograd, first step", {.lr = 0.01, .beta1 = 0.9, .beta2 = 0.98, .eps = 1e-8}, 1, {}),
    make_setting<Prodigy>("prodigy",
                          {.lr = 1.0,
                           .beta1 = 0.9,
                           .beta2 = 0.999,
                           .beta3 = -1.0,
                           .eps = 1e-8,
                           .weight_decay = 0.1,
                           .d = 0.01,
                           .d0 = 1e-3,
                           .decouple = 1.0,
                           .slice_p = 1.0},
                          3, {.d_numerator = 0.5, .d_denom = 2.0}),
    make_setting<Prodigy>("prodigy, coupled, corrected, safeguarded",
                          {.lr = 0.3,
                           .beta1 = 0.4,
                           .beta2 = 0.9,
                           .beta3 = 0.8,
                           .eps = 1e-3,
                           .weight_decay = 0.1,
                           .d = 0.02,
                           .d0 = 0.01,
                           .use_bias_correction = 1.0,
                           .safeguard_warmup = 1.0,
                           .slice_p = 1.0},
                          3, {.d_numerator = -0.5}),
    make_setting<Prodigy>("prodigy, a slice",
                          {.lr = 1.0,
                           .beta1 = 0.9,
                           .beta2 = 0.99,
                           .beta3 = 0.9,
                           .eps = 1e-8,
                           .d = 0.01,
                           .d0 = 0.01,
                           .decouple = 1.0,
                           .slice_p = 11.0},
                          1, {}),
    make_setting<Nadam>("nadam", {.lr = 0.01, .beta1 = 0.9, .beta2 = 0.999, .eps = 1e-8, .momentum_decay = 4e-3}, 3,
                        {.mu_product = 0.2}),
    make_setting<Nadam>(
        "nadam, decay",
        {.lr = 0.01, .beta1 = 0.9, .beta2 = 0.99, .eps = 1e-8, .weight_decay = 0.1, .momentum_decay = 0.1}, 3,
        {.mu_product = 0.2}),
    make_setting<Nadam>("nadam, decoupled",
                        {.lr = 0.01,
                         .beta1 = 0.9,
                         .beta2 = 0.99,
                         .eps = 1e-8,
                         .weight_decay = 0.1,
                         .momentum_decay = 0.1,
                         .decoupled_weight_decay = 1.0},
                        3, {.mu_product = 0.2}),
    make_setting<Nadam>("nadam, cautious",
                        {.lr = 0.01,
                         .beta1 = 0.9,
                         .beta2 = 0.9,
                         .eps = 1e-3,
                         .weight_decay = 0.1,
                         .momentum_decay = 0.1,
                         .decoupled_weight_decay = 1,
                         .cautious = 1,
                         .cautious_weight_decay = 1},
                        3, {.mu_product = 0.2}),
    make_setting<Radam>("radam, not yet adaptive",
                        {.lr = 0.01, .beta1 = 0.9, .beta2 = 0.999, .eps = 1e-8, .weight_decay = 0.1}, 5),
    make_setting<Radam>("radam", {.lr = 0.01, .beta1 = 0.9, .beta2 = 0.999, .eps = 1e-8}, 6),
    make_setting<Radam>(
        "radam, decoupled",
        {.lr = 0.01, .beta1 = 0.9, .beta2 = 0.99, .eps = 1e-3, .weight_decay = 0.1, .decoupled_weight_decay = 1.0}, 40),
    make_setting<Radam>("radam, cautious",
                        {.lr = 0.01,
                         .beta1 = 0.9,
                         .beta2 = 0.99,
                         .eps = 1e-3,
                         .weight_decay = 0.1,
                         .decoupled_weight_decay = 1,
                         .cautious = 1,
                         .cautious_weight_decay = 1},
                        40),
    make_setting<Rmsprop>("rmsprop", {.lr = 0.01, .alpha = 0.99, .eps = 1e-8}, 3),
    make_setting<Rmsprop>("rmsprop, momentum",
                          {.lr = 0.01, .alpha = 0.99, .eps = 1e-8, .weight_decay = 0.1, .momentum = 0.9}, 3),
    make_setting<Rmsprop>("rmsprop, centered", {.lr = 0.01, .alpha = 0.99, .eps = 1e-3, .centered = 1.0}, 3),
    make_setting<Rmsprop>(
        "rmsprop, centered, momentum",
        {.lr = 0.01, .alpha = 0.9, .eps = 1e-3, .weight_decay = 0.1, .momentum = 0.9, .centered = 1.0}, 3),
    make_setting<Rmsprop>(
        "rmsprop, cautious",
        {.lr = 0.01, .alpha = 0.9, .eps = 1e-3, .weight_decay = 0.1, .momentum = 0.9, .centered = 1, .cautious = 1}, 3),
    make_setting<Rprop>("rprop", {.eta_minus = 0.5, .eta_plus = 1.2, .smallest = 1e-6, .largest = 50.0}, 3),
    make_setting<Rprop>("rprop, narrow", {.eta_minus = 0.3, .eta_plus = 1.5, .smallest = 0.1, .largest = 0.5}, 3),
    make_setting<ScheduleFreeAdamW>("schedule_free_adamw",
                                    {.lr = 0.01, .beta1 = 0.9, .beta2 = 0.999, .eps = 1e-8, .weight_lr_power = 2.0}, 3,
                                    {.lr_max = 0.01, .weight_sum = 2e-4}),
    make_setting<ScheduleFreeAdamW>("schedule_free_adamw, first step, warm-up, decay",
                                    {.lr = 0.01,
                                     .beta1 = 0.9,
                                     .beta2 = 0.9,
                                     .eps = 1e-3,
                                     .weight_decay = 0.1,
                                     .warmup_steps = 10.0,
                                     .r = 1.0,
                                     .weight_lr_power = 2.0},
                                    1),
    make_setting<ScheduleFreeRadam>("schedule_free_radam",
                                    {.lr = 0.02, .beta1 = 0.9, .beta2 = 0.999, .eps = 1e-8, .weight_lr_power = 2.0}, 6,
                                    {.lr_max = 0.002, .weight_sum = 4e-6}),
    make_setting<ScheduleFreeRadam>(
        "schedule_free_radam, not yet adaptive, decay",
        {.lr = 0.01, .beta1 = 0.8, .beta2 = 0.999, .eps = 1e-3, .weight_decay = 0.1, .r = 0.5, .weight_lr_power = 1.0},
        3, {.lr_max = 0.01, .weight_sum = 0.02}),
    make_setting<ScheduleFreeRadam>("schedule_free_radam, silent",
                                    {.lr = 0.01,
                                     .beta1 = 0.9,
                                     .beta2 = 0.999,
                                     .eps = 1e-8,
                                     .weight_decay = 0.1,
                                     .weight_lr_power = 2.0,
                                     .silent_sgd_phase = 1.0},
                                    3),
    make_setting<ScheduleFreeSgd>("schedule_free_sgd", {.lr = 0.1, .momentum = 0.9, .weight_lr_power = 2.0}, 3,
                                  {.lr_max = 0.1, .weight_sum = 0.02}),
    make_setting<ScheduleFreeSgd>(
        "schedule_free_sgd, warm-up, decay",
        {.lr = 0.1, .momentum = 0.4, .weight_decay = 0.01, .warmup_steps = 7.0, .r = 1.0, .weight_lr_power = 1.0}, 2,
        {.lr_max = 0.05, .weight_sum = 0.015}),
    make_setting<Sgd>("sgd, plain", {.lr = 0.1}, 2),
    make_setting<Sgd>("sgd, cautious", {.lr = 0.1, .momentum = 0.9, .weight_decay = 0.1, .nesterov = 1, .cautious = 1},
                      2),
    make_setting<Sgd>("sgd, first step", {.lr = 0.1, .momentum = 0.9, .dampening = 0.3, .weight_decay = 0.01}, 1),
    make_setting<Sgd>("sgd, nesterov",
                      {.lr = 0.1, .momentum = 0.9, .dampening = 0.3, .weight_decay = 0.01, .nesterov = 1.0}, 2),
    make_setting<Signum>("signum", {.lr = 0.01, .momentum = 0.9}, 1),
    make_setting<Signum>("signum, cautious",
                         {.lr = 0.01, .momentum = 0.9, .weight_decay = 0.1, .cautious = 1, .cautious_weight_decay = 1},
                         1),
    make_setting<Signum>("signum, decay", {.lr = 0.01, .momentum = 0.9, .weight_decay = 0.1}, 1),
    make_setting<Signum>("signum, small momentum", {.lr = 0.01, .momentum = 0.4}, 1),
    make_setting<SparseAdam>("sparse_adam", {.lr = 0.01, .beta1 = 0.9, .beta2 = 0.999, .eps = 1e-8}, 3),
    make_setting<StableAdamW>("stable_adamw", {.lr = 0.01, .beta1 = 0.9, .beta2 = 0.99, .eps = 1e-6}, 3),
    make_setting<StableAdamW>("stable_adamw, decay",
                              {.lr = 0.01, .beta1 = 0.4, .beta2 = 0.9, .eps = 1e-3, .weight_decay = 0.1}, 3),
};

inline const Setting& setting_of(std::string_view what) {
  for (const Setting& setting : kSettings)
    if (setting.what == what) return setting;
  throw std::logic_error("no such setting");
}

// A rule's `Constants`, computed as in the bindings.
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

// Returns the number of operands: parameter, gradient and all states that the rule can have. A setting may not use some
// of the states.
inline std::size_t operands_of(const Setting& setting) {
  return kFirstState + info_of(setting.rule).state_names.size();
}
inline bool uses(const Setting& setting, std::size_t operand) {
  return operand < kFirstState || (states_used(setting) >> (operand - kFirstState) & 1U) != 0;
}

// Returns the instruction sets that this machine supports.
inline std::vector<Isa> supported_isas() {
  std::vector<Isa> isas;
  for (const Isa& isa : compiled_isas())
    if (isa.supported()) isas.push_back(isa);
  return isas;
}

}  // namespace onepass::testing
