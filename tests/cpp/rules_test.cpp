// The rules: values worked out by hand, whole runs against the formulas of the papers, and their entries in the table.
#include <doctest/doctest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

#include "cases.h"
#include "rules/adafactor.h"
#include "rules/came.h"

namespace onepass::testing {
namespace {

constexpr double nan = std::numeric_limits<double>::quiet_NaN();
constexpr double infinity = std::numeric_limits<double>::infinity();

using Values = std::array<double, kMaxOperands>;  // parameter, gradient, states

// One update in arithmetic T, of a tensor of one element. Replaces the setting's scalars by those after it.
template <class T>
Values update(Setting& setting, Values values) {
  const Constants constants(setting, sizeof(T) == 8);
  T v[kMaxOperands] = {};
  for (std::size_t k = 0; k < values.size(); ++k) v[k] = static_cast<T>(values[k]);
  with_rule(setting.rule, [&]<class Rule>() {
    auto own = constants.as<typename Rule::template Constants<T>>();
    [&]<std::size_t... I>(std::index_sequence<I...>) {
      const RuleInfo& info = info_of(setting.rule);
      if constexpr (requires { Rule::sums; }) {
        std::array<double, kMaxSums> sums{};
        [&]<std::size_t... K>(std::index_sequence<K...>) {
          ((sums[K] = static_cast<double>(Rule::template summed<K>(own, v[kParam], v[kGrad], v[kFirstState + I]...))),
           ...);
        }(std::make_index_sequence<Rule::sums>());
        info.advance(setting.hyper.data(), setting.step, setting.scalars.data());
        if (info.takes_sums(setting.hyper.data()))
          info.use_sums(sizeof(T) == 8, sums.data(), 1.0, &own, setting.scalars.data());
      } else {
        info.advance(setting.hyper.data(), setting.step, setting.scalars.data());
      }
      Rule::update(own, v[kParam], v[kGrad], v[kFirstState + I]...);
    }(std::make_index_sequence<Rule::state_names.size()>());
  });
  for (std::size_t k = 0; k < values.size(); ++k) values[k] = static_cast<double>(v[k]);
  return values;
}

struct Row {
  Setting setting;
  Values before;
  Values after;
};

// Sums and products of a few powers of two: exact in float32 and float64.
constexpr Row kByHand[] = {
    {make_setting<Adadelta>("adadelta", {.lr = 0.5, .rho = 0.5, .eps = 1}, 1), {1, 2, 2, 3}, {0, 2, 3, 3.5}},
    {make_setting<Adadelta>("negative gradient", {.lr = 0.5, .rho = 0.5, .eps = 1}, 1), {1, -2, 2, 3}, {2, -2, 3, 3.5}},
    {make_setting<Adadelta>("zero gradient", {.lr = 0.5, .rho = 0.5, .eps = 1}, 1), {1, 0, 2, 3}, {1, 0, 1, 1.5}},
    {make_setting<Adadelta>("decay", {.lr = 0.5, .rho = 0.5, .eps = 1, .weight_decay = 0.5}, 1),
     {2, 1, 2, 3},
     {1, 1, 3, 3.5}},
    {make_setting<Adadelta>("NaN gradient", {.lr = 0.5, .rho = 0.5, .eps = 1}, 1),
     {1, nan, 2, 3},
     {nan, nan, nan, nan}},
    {make_setting<Adadelta>("NaN acc_delta", {.lr = 0.5, .rho = 0.5, .eps = 1}, 1), {1, 2, 2, nan}, {nan, 2, 3, nan}},

    {make_setting<Adagrad>("adagrad", {.lr = 0.5}, 1), {1, 2, 12}, {0.75, 2, 16}},
    {make_setting<Adagrad>("eps", {.lr = 0.5, .eps = 4}, 1), {1, 2, 12}, {0.875, 2, 16}},
    {make_setting<Adagrad>("rate decays", {.lr = 1.5, .lr_decay = 1}, 3), {1, 2, 12}, {0.75, 2, 16}},
    {make_setting<Adagrad>("coupled decay", {.lr = 0.5, .weight_decay = 0.5}, 1), {2, 1, 12}, {1.75, 1, 16}},
    {make_setting<Adagrad>("decoupled decay", {.lr = 0.5, .weight_decay = 0.5, .decoupled_weight_decay = 1}, 1),
     {2, 2, 12},
     {1.25, 2, 16}},
    {make_setting<Adagrad>("NaN gradient", {.lr = 0.5}, 1), {1, nan, 12}, {nan, nan, nan}},

    // After step 1 with g = 2, m = 1 and v = 1. With bias correction they are 2 and 4, and the change is lr * 2 / (2 +
    // eps).
    {make_setting<Adam>("first step", {.lr = 0.25, .beta1 = 0.5, .beta2 = 0.75, .eps = 2}, 1),
     {1, 2, 0, 0},
     {0.875, 2, 1, 1}},
    {make_setting<Adam>("states are averages", {.lr = 0.25, .beta1 = 0.5, .beta2 = 0.75, .eps = 6}, 1),
     {0, 4, 8, 28},
     {-0.1875, 4, 6, 25}},
    {make_setting<Adam>("coupled decay", {.lr = 0.25, .beta1 = 0.5, .beta2 = 0.75, .eps = 2, .weight_decay = 0.5}, 1),
     {2, 1, 0, 0},
     {1.875, 1, 1, 1}},
    {make_setting<Adam>(
         "decoupled decay",
         {.lr = 0.25, .beta1 = 0.5, .beta2 = 0.75, .eps = 2, .weight_decay = 0.5, .decoupled_weight_decay = 1}, 1),
     {2, 2, 0, 0},
     {1.625, 2, 1, 1}},
    {make_setting<Adam>("decoupled without decay",
                        {.lr = 0.25, .beta1 = 0.5, .beta2 = 0.75, .eps = 2, .decoupled_weight_decay = 1}, 1),
     {2, 2, 0, 0},
     {1.875, 2, 1, 1}},
    {make_setting<Adam>("amsgrad, old maximum", {.lr = 0.25, .beta1 = 0.5, .beta2 = 0.75, .eps = 4, .amsgrad = 1}, 1),
     {1, 2, 0, 0, 4},
     {0.9375, 2, 1, 1, 4}},
    {make_setting<Adam>("amsgrad, new maximum", {.lr = 0.25, .beta1 = 0.5, .beta2 = 0.75, .eps = 2, .amsgrad = 1}, 1),
     {1, 2, 0, 0, 0.5},
     {0.875, 2, 1, 1, 1}},
    {make_setting<Adam>("zero gradient", {.lr = 0.25, .beta1 = 0.5, .beta2 = 0.75, .eps = 2}, 1),
     {1, 0, 0, 0},
     {1, 0, 0, 0}},
    {make_setting<Adam>("infinite v stops p", {.lr = 0.25, .beta1 = 0.5, .beta2 = 0.75, .eps = 2}, 1),
     {1, 2, 0, infinity},
     {1, 2, 1, infinity}},
    {make_setting<Adam>("NaN gradient", {.lr = 0.25, .beta1 = 0.5, .beta2 = 0.75, .eps = 2, .amsgrad = 1}, 1),
     {1, nan, 0, 0, 4},
     {nan, nan, nan, nan, nan}},
    {make_setting<Adam>("NaN parameter", {.lr = 0.25, .beta1 = 0.5, .beta2 = 0.75, .eps = 2}, 1),
     {nan, 2, 0, 0},
     {nan, 2, 1, 1}},
    {make_setting<Adam>("NaN exp_avg", {.lr = 0.25, .beta1 = 0.5, .beta2 = 0.75, .eps = 2}, 1),
     {1, 2, nan, 0},
     {nan, 2, nan, 1}},
    {make_setting<Adam>("NaN exp_avg_sq", {.lr = 0.25, .beta1 = 0.5, .beta2 = 0.75, .eps = 2, .amsgrad = 1}, 1),
     {1, 2, 0, nan, 4},
     {nan, 2, 1, nan, nan}},
    {make_setting<Adam>("NaN maximum", {.lr = 0.25, .beta1 = 0.5, .beta2 = 0.75, .eps = 2, .amsgrad = 1}, 1),
     {1, 2, 0, 0, nan},
     {nan, 2, 1, 1, nan}},

    {make_setting<Adamax>("new maximum", {.lr = 0.25, .beta1 = 0.5, .beta2 = 0.5, .eps = 2}, 1),
     {1, 2, 0, 4},
     {0.875, 2, 1, 4}},
    {make_setting<Adamax>("old maximum", {.lr = 0.25, .beta1 = 0.5, .beta2 = 0.5, .eps = 2}, 1),
     {1, 2, 0, 16},
     {0.9375, 2, 1, 8}},
    {make_setting<Adamax>("negative gradient", {.lr = 0.25, .beta1 = 0.5, .beta2 = 0.5, .eps = 2}, 1),
     {1, -2, 0, 0},
     {1.125, -2, -1, 4}},
    {make_setting<Adamax>("decay", {.lr = 0.25, .beta1 = 0.5, .beta2 = 0.5, .eps = 2, .weight_decay = 0.5}, 1),
     {2, 1, 0, 0},
     {1.875, 1, 1, 4}},
    {make_setting<Adamax>("NaN gradient", {.lr = 0.25, .beta1 = 0.5, .beta2 = 0.5, .eps = 2}, 1),
     {1, nan, 0, 16},
     {nan, nan, nan, nan}},
    {make_setting<Adamax>("NaN exp_inf", {.lr = 0.25, .beta1 = 0.5, .beta2 = 0.5, .eps = 2}, 1),
     {1, 2, 0, nan},
     {nan, 2, 1, nan}},

    // m is 4, and so is the difference; s is 0.25 * 16 + 12. The corrections are 1/2 and 1/4: 8 / (8 + 12).
    {make_setting<AdaBelief>("first step", {.lr = 5, .beta1 = 0.5, .beta2 = 0.75, .eps = 12}, 1),
     {1, 8, 0, 0},
     {-1, 8, 4, 16}},
    {make_setting<AdaBelief>("NaN gradient", {.lr = 0.25, .beta1 = 0.5, .beta2 = 0.75, .eps = 1}, 1),
     {1, nan, 0, 0},
     {nan, nan, nan, nan}},

    // n is 0.25 * 16, its correction 1/4: the root is 4. The corrected m is 4.
    {make_setting<Adan>("first step", {.lr = 0.5, .beta1 = 0.5, .beta2 = 0.5, .beta3 = 0.75, .eps = 4}, 1),
     {1, 4, 0, 0, 0, nan},
     {0.75, 4, 2, 0, 4, -4}},
    {make_setting<Adan>("first step, proximal decay",
                        {.lr = 0.5, .beta1 = 0.5, .beta2 = 0.5, .beta3 = 0.75, .eps = 4, .weight_decay = 2}, 1),
     {1, 4, 0, 0, 0, nan},
     {0.375, 4, 2, 0, 4, -4}},
    {make_setting<Adan>(
         "first step, other decay",
         {.lr = 0.5, .beta1 = 0.5, .beta2 = 0.5, .beta3 = 0.75, .eps = 4, .weight_decay = 1, .no_prox = 1}, 1),
     {1, 4, 0, 0, 0, nan},
     {0.25, 4, 2, 0, 4, -4}},

    // v is 0.25 * 16, its root corrected 4; m corrected 4, the slow average 2 * 1/4 * 4.
    {make_setting<AdEMAMix>("first step",
                            {.lr = 0.5,
                             .beta1 = 0.5,
                             .beta2 = 0.75,
                             .beta3 = 0.75,
                             .alpha = 2,
                             .beta3_warmup = -1,
                             .alpha_warmup = -1,
                             .eps = 4},
                            1),
     {1, 4, 0, 0, 0},
     {0.625, 4, 2, 1, 4}},
    {make_setting<AdEMAMix>("half of alpha",
                            {.lr = 0.5,
                             .beta1 = 0.5,
                             .beta2 = 0.75,
                             .beta3 = 0.75,
                             .alpha = 4,
                             .beta3_warmup = -1,
                             .alpha_warmup = 2,
                             .eps = 4},
                            1),
     {1, 4, 0, 0, 0},
     {0.625, 4, 2, 1, 4}},

    // The first step stores the square of the gradient, and nothing else.
    {make_setting<Adopt>("first step", {.lr = 0.5, .beta1 = 0.5, .beta2 = 0.75, .eps = 1, .clip_exponent = 0.25}, 1),
     {1, 3, 0, 0},
     {1, 3, 0, 9}},
    {make_setting<Adopt>("first step of an infinite parameter", {.lr = 0.5, .beta1 = 0.5, .beta2 = 0.75, .eps = 1}, 1),
     {infinity, 3, 0, 0},
     {infinity, 3, 0, 9}},
    {make_setting<Adopt>("clipped", {.lr = 0.5, .beta1 = 0.5, .beta2 = 0.75, .eps = 1, .clip_exponent = 1}, 3),
     {1, 12, 0, 4},
     {0.5, 12, 1, 39}},
    {make_setting<Adopt>("not clipped", {.lr = 0.5, .beta1 = 0.5, .beta2 = 0.75, .eps = 1, .clip_exponent = -1}, 3),
     {1, 12, 0, 4},
     {-0.5, 12, 3, 39}},
    {make_setting<Adopt>("eps", {.lr = 0.5, .beta1 = 0.5, .beta2 = 0.75, .eps = 4, .clip_exponent = 1}, 3),
     {1, 4, 0, 4},
     {0.75, 4, 0.5, 7}},

    {make_setting<Asgd>("follows", {.lambd = 0.5}, 1, {.eta = 0.5, .mu = 1}), {2, 1, 8}, {1, 1, 1}},
    {make_setting<Asgd>("follows, from a NaN", {.lambd = 0.5}, 1, {.eta = 0.5, .mu = 1}), {2, 1, nan}, {1, 1, 1}},
    {make_setting<Asgd>("averages", {.lambd = 0.5}, 1, {.eta = 0.5, .mu = 0.5}), {2, 1, 3}, {1, 1, 2}},
    {make_setting<Asgd>("decay", {.lambd = 0.5, .weight_decay = 0.5}, 1, {.eta = 0.5, .mu = 0.5}),
     {2, 1, 2.5},
     {0.5, 1, 1.5}},
    {make_setting<Asgd>("NaN gradient", {.lambd = 0.5}, 1, {.eta = 0.5, .mu = 0.5}), {2, nan, 3}, {nan, nan, nan}},

    // v is 0.25 * 16, corrected 16: the gradient is divided by 4 + 4.
    {make_setting<LaProp>("first step", {.lr = 0.5, .beta1 = 0.5, .beta2 = 0.75, .eps = 4}, 1),
     {1, 4, 0, 0},
     {0.75, 4, 0.25, 4}},
    {make_setting<LaProp>("decay", {.lr = 0.5, .beta1 = 0.5, .beta2 = 0.75, .eps = 4, .weight_decay = 0.5}, 1),
     {1, 4, 0, 0},
     {0.5, 4, 0.25, 4}},

    {make_setting<Lion>("sign is -1", {.lr = 0.25, .beta1 = 0.5, .beta2 = 0.75}, 1), {1, -2, 1}, {1.25, -2, 0.25}},
    {make_setting<Lion>("sign is 1", {.lr = 0.25, .beta1 = 0.5, .beta2 = 0.75}, 1), {1, 2, -1}, {0.75, 2, -0.25}},
    {make_setting<Lion>("sign is 0", {.lr = 0.25, .beta1 = 0.5, .beta2 = 0.75}, 1), {1, -2, 2}, {1, -2, 1}},
    {make_setting<Lion>("sign is 0, with decay", {.lr = 0.25, .beta1 = 0.5, .beta2 = 0.75, .weight_decay = 0.5}, 1),
     {2, -2, 2},
     {1.75, -2, 1}},
    {make_setting<Lion>("nothing at all", {.lr = 0.25, .beta1 = 0.5, .beta2 = 0.75}, 1), {1, 0, 0}, {1, 0, 0}},
    {make_setting<Lion>("decay", {.lr = 0.25, .beta1 = 0.5, .beta2 = 0.75, .weight_decay = 0.5}, 1),
     {2, -2, 1},
     {2, -2, 0.25}},
    {make_setting<Lion>("NaN gradient", {.lr = 0.25, .beta1 = 0.5, .beta2 = 0.75}, 1), {1, nan, 1}, {nan, nan, nan}},
    {make_setting<Lion>("NaN parameter", {.lr = 0.25, .beta1 = 0.5, .beta2 = 0.75}, 1), {nan, -2, 1}, {nan, -2, 0.25}},
    {make_setting<Lion>("NaN exp_avg", {.lr = 0.25, .beta1 = 0.5, .beta2 = 0.75}, 1), {1, -2, nan}, {nan, -2, nan}},

    // The gradient is the orthogonalized update.
    {make_setting<Muon>("muon", {.adjusted_lr = 0.25}, 1), {1, 2}, {0.5, 2}},
    {make_setting<Muon>("decay", {.decay = 0.5, .adjusted_lr = 0.25}, 1), {2, 2}, {0.5, 2}},
    {make_setting<Muon>("no decay of an infinite parameter", {.adjusted_lr = 0.25}, 1), {infinity, 2}, {infinity, 2}},
    {make_setting<Muon>("NaN update", {.decay = 0.5, .adjusted_lr = 0.25}, 1), {2, nan}, {nan, nan}},

    // The parameter is only written.
    {make_setting<MuonMomentum>("momentum", {.momentum = 0.75}, 1), {nan, 4, 8}, {7, 4, 7}},
    {make_setting<MuonMomentum>("nesterov", {.momentum = 0.75, .nesterov = 1}, 1), {nan, 4, 8}, {6.25, 4, 7}},
    {make_setting<MuonMomentum>("small momentum", {.momentum = 0.25}, 1), {nan, 4, 8}, {5, 4, 5}},
    {make_setting<MuonMomentum>("small momentum, nesterov", {.momentum = 0.25, .nesterov = 1}, 1),
     {nan, 4, 8},
     {4.25, 4, 5}},
    {make_setting<MuonMomentum>("NaN gradient", {.momentum = 0.75, .nesterov = 1}, 1), {1, nan, 8}, {nan, nan, nan}},

    {make_setting<Nadam>("nadam", {.lr = 0.25, .beta1 = 0.5, .beta2 = 0.75, .eps = 2}, 1, {}),
     {1, 2, 0, 0},
     {0.890625, 2, 1, 1}},
    {make_setting<Nadam>("coupled", {.lr = 0.25, .beta1 = 0.5, .beta2 = 0.75, .eps = 2, .weight_decay = 0.5}, 1, {}),
     {2, 1, 0, 0},
     {1.890625, 1, 1, 1}},
    {make_setting<Nadam>(
         "decoupled",
         {.lr = 0.25, .beta1 = 0.5, .beta2 = 0.75, .eps = 2, .weight_decay = 0.5, .decoupled_weight_decay = 1}, 1, {}),
     {2, 2, 0, 0},
     {1.640625, 2, 1, 1}},
    {make_setting<Nadam>("NaN gradient", {.lr = 0.25, .beta1 = 0.5, .beta2 = 0.75, .eps = 2}, 1, {}),
     {1, nan, 0, 0},
     {nan, nan, nan, nan}},

    // rho is 7 for beta2 = 0.75, and rho_1 is 1.
    {make_setting<Radam>("not yet adaptive", {.lr = 0.25, .beta1 = 0.5, .beta2 = 0.75, .eps = 2}, 1),
     {1, 2, 0, 0},
     {0.5, 2, 1, 1}},
    {make_setting<Radam>("not yet, infinite v", {.lr = 0.25, .beta1 = 0.5, .beta2 = 0.75, .eps = 2}, 1),
     {1, 2, 0, infinity},
     {0.5, 2, 1, infinity}},
    {make_setting<Radam>("coupled", {.lr = 0.25, .beta1 = 0.5, .beta2 = 0.75, .eps = 2, .weight_decay = 0.5}, 1),
     {2, 1, 0, 0},
     {1.5, 1, 1, 1}},
    {make_setting<Radam>(
         "decoupled",
         {.lr = 0.25, .beta1 = 0.5, .beta2 = 0.75, .eps = 2, .weight_decay = 0.5, .decoupled_weight_decay = 1}, 1),
     {2, 2, 0, 0},
     {1.25, 2, 1, 1}},
    {make_setting<Radam>("NaN gradient", {.lr = 0.25, .beta1 = 0.5, .beta2 = 0.75, .eps = 2}, 1),
     {1, nan, 0, 0},
     {nan, nan, nan, nan}},

    {make_setting<Rmsprop>("rmsprop", {.lr = 0.5, .alpha = 0.5}, 1), {1, 2, 28}, {0.75, 2, 16}},
    {make_setting<Rmsprop>("eps", {.lr = 0.5, .alpha = 0.5, .eps = 4}, 1), {1, 2, 28}, {0.875, 2, 16}},
    {make_setting<Rmsprop>("decay", {.lr = 0.5, .alpha = 0.5, .weight_decay = 0.5}, 1), {2, 1, 28}, {1.75, 1, 16}},
    {make_setting<Rmsprop>("momentum", {.lr = 0.5, .alpha = 0.5, .momentum = 0.5}, 1), {1, 2, 28, 1}, {0.5, 2, 16, 1}},
    {make_setting<Rmsprop>("centered", {.lr = 0.5, .alpha = 0.5, .centered = 1}, 1),
     {1, 2, 36, 0, 6},
     {0.5, 2, 20, 0, 4}},
    {make_setting<Rmsprop>("variance below zero", {.lr = 0.5, .alpha = 0.5, .eps = 2, .centered = 1}, 1),
     {1, 2, 0, 0, 6},
     {0.5, 2, 2, 0, 4}},
    {make_setting<Rmsprop>("both", {.lr = 0.5, .alpha = 0.5, .momentum = 0.5, .centered = 1}, 1),
     {1, 2, 36, 2, 6},
     {0, 2, 20, 2, 4}},
    {make_setting<Rmsprop>("NaN gradient", {.lr = 0.5, .alpha = 0.5, .momentum = 0.5, .centered = 1}, 1),
     {1, nan, 36, 2, 6},
     {nan, nan, nan, nan, nan}},
    {make_setting<Rmsprop>("NaN square_avg", {.lr = 0.5, .alpha = 0.5, .centered = 1}, 1),
     {1, 2, nan, 0, 6},
     {nan, 2, nan, 0, 4}},

    {make_setting<Rprop>("same sign", {.eta_minus = 0.5, .eta_plus = 2, .smallest = 0.125, .largest = 8}, 1),
     {1, 3, 1, 1},
     {-1, 3, 3, 2}},
    {make_setting<Rprop>("same sign, negative", {.eta_minus = 0.5, .eta_plus = 2, .smallest = 0.125, .largest = 8}, 1),
     {1, -3, -1, 1},
     {3, -3, -3, 2}},
    {make_setting<Rprop>("opposite signs", {.eta_minus = 0.5, .eta_plus = 2, .smallest = 0.125, .largest = 8}, 1),
     {1, 3, -1, 1},
     {1, 3, 0, 0.5}},
    {make_setting<Rprop>("after a change of sign", {.eta_minus = 0.5, .eta_plus = 2, .smallest = 0.125, .largest = 8},
                         1),
     {1, 3, 0, 1},
     {0, 3, 3, 1}},
    {make_setting<Rprop>("zero gradient", {.eta_minus = 0.5, .eta_plus = 2, .smallest = 0.125, .largest = 8}, 1),
     {1, 0, 3, 1},
     {1, 0, 0, 1}},
    {make_setting<Rprop>("largest step", {.eta_minus = 0.5, .eta_plus = 2, .smallest = 0.125, .largest = 8}, 1),
     {1, 3, 1, 5},
     {-7, 3, 3, 8}},
    {make_setting<Rprop>("smallest step", {.eta_minus = 0.5, .eta_plus = 2, .smallest = 0.125, .largest = 8}, 1),
     {1, 3, -1, 0.125},
     {1, 3, 0, 0.125}},
    {make_setting<Rprop>("tiny gradients agree", {.eta_minus = 0.5, .eta_plus = 2, .smallest = 0.125, .largest = 8}, 1),
     {1, 0x1p-100, 0x1p-100, 1},
     {-1, 0x1p-100, 0x1p-100, 2}},
    {make_setting<Rprop>("NaN gradient", {.eta_minus = 0.5, .eta_plus = 2, .smallest = 0.125, .largest = 8}, 1),
     {1, nan, 1, 1},
     {1, nan, nan, 1}},

    // lr_max 0.5 as before, so the weight is 0.25 of a sum of 1, and y moves by a quarter to z, and by 5/8 of the
    // change.
    {make_setting<ScheduleFreeSgd>("schedule_free_sgd", {.lr = 0.5, .momentum = 0.5, .weight_lr_power = 2}, 4,
                                   {.lr_max = 0.5, .weight_sum = 0.75}),
     {4, 4, 8},
     {3.75, 4, 6}},
    {make_setting<ScheduleFreeSgd>("first step: y = z", {.lr = 0.5, .momentum = 0.75, .weight_lr_power = 2}, 1),
     {4, 4, 4},
     {2, 4, 2}},
    {make_setting<ScheduleFreeSgd>(
         "warm-up, decay", {.lr = 1, .momentum = 0.5, .weight_decay = 1, .warmup_steps = 8, .weight_lr_power = 2}, 4,
         {.lr_max = 0.5, .weight_sum = 0.75}),
     {4, 4, 8},
     {2.5, 4, 4}},
    {make_setting<ScheduleFreeSgd>("a rate of zero", {.momentum = 0.5, .weight_decay = 1, .weight_lr_power = 2}, 1),
     {4, 4, 8},
     {4, 4, 8}},
    {make_setting<ScheduleFreeAdamW>("schedule_free_adamw",
                                     {.lr = 0.5, .beta1 = 0.5, .beta2 = 0.75, .weight_lr_power = 2}, 1,
                                     {.lr_max = 0.5, .weight_sum = 0.75}),
     {4, 4, 8, 0},
     {4.6875, 4, 7.5, 4}},
    {make_setting<ScheduleFreeRadam>("not yet adaptive", {.lr = 0.5, .beta1 = 0.5, .beta2 = 0.75, .weight_lr_power = 2},
                                     1, {.lr_max = 0.5, .weight_sum = 0.75}),
     {4, 4, 8, 0},
     {3.75, 4, 6, 4}},
    {make_setting<ScheduleFreeRadam>(
         "silent", {.lr = 0.5, .beta1 = 0.5, .beta2 = 0.75, .weight_lr_power = 2, .silent_sgd_phase = 1}, 1),
     {4, 4, 8, 0},
     {4, 4, 8, 4}},

    // The norms are those of one element. m = 1, v = 0.25 with bias correction, so u = 1 / (0.5 + 0.5) + 1, and the
    // ratio is 4 / 2.
    {make_setting<Lamb>(
         "lamb", {.lr = 0.5, .beta1 = 0.5, .beta2 = 0.75, .eps = 0.5, .weight_decay = 0.25, .trust_ratio = 1}, 1),
     {4, 0.5, 0.5, 0},
     {2, 0.5, 0.5, 0.0625}},
    {make_setting<Lamb>(
         "clipped",
         {.lr = 0.5, .beta1 = 0.5, .beta2 = 0.75, .eps = 0.5, .weight_decay = 0.25, .trust_ratio = 1, .trust_clip = 1},
         1),
     {4, 0.5, 0.5, 0},
     {3, 0.5, 0.5, 0.0625}},
    {make_setting<Lamb>("parameter of zero", {.lr = 0.5, .beta1 = 0.5, .beta2 = 0.75, .eps = 0.5, .trust_ratio = 1}, 1),
     {0, 0.5, 0.5, 0},
     {-0.5, 0.5, 0.5, 0.0625}},
    // The ratio is 0.5 * 4 / (1 + 0.25 * 4) = 1.
    {make_setting<Lars>(
         "lars", {.lr = 0.5, .momentum = 0.5, .weight_decay = 0.25, .trust_coefficient = 0.5, .trust_ratio = 1}, 1),
     {4, 1, 2},
     {2.5, 1, 3}},
    {make_setting<Lars>("no ratio", {.lr = 0.5, .momentum = 0.5, .trust_coefficient = 0.5}, 1), {4, 2, 2}, {2.5, 2, 3}},
    {make_setting<Lars>("gradient of zero",
                        {.lr = 0.5, .weight_decay = 0.25, .trust_coefficient = 0.5, .trust_ratio = 1}, 1),
     {4, 0, 0},
     {3.5, 0, 1}},
    // c = 0.5 + 1 * (0.5 - 0.25) = 0.75; c = 2 + 1 * (2 - 0) = 4, clipped to 1.
    {make_setting<Mars>("not clipped", {.lr = 0.5, .beta1 = 0.5, .beta2 = 0, .weight_decay = 0.25, .gamma = 1}, 60),
     {4, 0.5, 0.75, 0, 0.25},
     {3, 0.5, 0.75, 0.5625, 0.5}},
    {make_setting<Mars>("clipped", {.lr = 0.5, .beta1 = 0.5, .beta2 = 0, .gamma = 1, .clip_correction = 1}, 60),
     {4, 2, 1, 0, 0},
     {3.5, 2, 1, 1, 2}},
    {make_setting<Mars>("first step", {.lr = 0.5, .beta1 = 0.5, .beta2 = 0.75, .gamma = 1, .clip_correction = 1}, 1),
     {4, 0.5, 0, 0, 0},
     {3.5, 0.5, 0.25, 0.0625, 0.5}},
    // v is 16 before and after, so m = 0.5 * 2 + 4 / 4 + 0.25 * 4.
    {make_setting<NovoGrad>("novograd", {.lr = 0.5, .beta1 = 0.5, .beta2 = 0.5, .weight_decay = 0.25}, 2,
                            {.exp_avg_norm_sq = 16}),
     {4, 4, 2},
     {2.5, 4, 3}},
    {make_setting<NovoGrad>("first step", {.lr = 0.5, .beta1 = 0.5, .beta2 = 0.5, .eps = 2}, 1, {}),
     {4, 2, 0},
     {3.75, 2, 0.5}},
    {make_setting<NovoGrad>("averaging",
                            {.lr = 0.5, .beta1 = 0.5, .beta2 = 0.5, .weight_decay = 0.25, .grad_averaging = 1}, 2,
                            {.exp_avg_norm_sq = 16}),
     {4, 4, 2},
     {3, 4, 2}},
    // The step size is 0.5 and d / d0 is 2. m = 0.5 * 2, v = 4; r = 0.5 * 8 + 1 * 2 * (5 - 4), s = 0.5 * 6 + 1 * 2.
    {make_setting<Prodigy>(
         "prodigy",
         {.lr = 0.5, .beta1 = 0.5, .beta3 = 0.5, .weight_decay = 0.25, .d = 1, .d0 = 0.5, .decouple = 1, .slice_p = 1},
         1, {.d_numerator = 8}),
     {4, 2, 0, 0, 6, 5},
     {3.25, 2, 1, 4, 5, 5}},
    // g' = 2 + 0.25 * 4; s = 0.5 * 6 + 2 * 3.
    {make_setting<Prodigy>("coupled, safeguarded",
                           {.lr = 0.5,
                            .beta1 = 0.5,
                            .beta3 = 0.5,
                            .weight_decay = 0.25,
                            .d = 1,
                            .d0 = 0.5,
                            .safeguard_warmup = 1,
                            .slice_p = 1},
                           1, {}),
     {4, 2, 0, 0, 6, 5},
     {3.75, 2, 1.5, 9, 9, 5}},
    // sqrt(1 - 0.75) / (1 - 0.5) is 1.
    {make_setting<Prodigy>(
         "a slice",
         {.lr = 0.5, .beta1 = 0.5, .beta2 = 0.75, .eps = 1, .d = 1, .d0 = 0.5, .use_bias_correction = 1, .slice_p = 4},
         1, {}),
     {4, 2, 0, 0},
     {3.75, 2, 1, 1}},
    // At step 1, m = g and v = g^2, so the root of the mean of squares is 1.
    {make_setting<StableAdamW>("first step", {.lr = 0.5, .beta1 = 0.5, .beta2 = 0.75, .weight_decay = 0.25}, 1),
     {4, 2, 0, 0},
     {3, 2, 2, 4}},

    {make_setting<Sgd>("plain", {.lr = 0.5}, 1), {1, 0.5}, {0.75, 0.5}},
    {make_setting<Sgd>("weight decay", {.lr = 0.5, .weight_decay = 0.25}, 2), {1, 0.5}, {0.625, 0.5}},
    {make_setting<Sgd>("nesterov means nothing without momentum", {.lr = 0.5, .nesterov = 1}, 2),
     {1, 0.5},
     {0.75, 0.5}},
    {make_setting<Sgd>("first step: not dampened", {.lr = 0.5, .momentum = 0.5, .dampening = 0.5}, 1),
     {1, 0.5, 8},
     {0.75, 0.5, 0.5}},
    {make_setting<Sgd>("momentum", {.lr = 0.5, .momentum = 0.5}, 2), {1, 0.5, 1}, {0.5, 0.5, 1}},
    {make_setting<Sgd>("dampening", {.lr = 0.5, .momentum = 0.5, .dampening = 0.5}, 2),
     {1, 0.5, 1},
     {0.625, 0.5, 0.75}},
    {make_setting<Sgd>("nesterov", {.lr = 0.5, .momentum = 0.5, .nesterov = 1}, 2), {1, 0.5, 3}, {0.25, 0.5, 2}},
    {make_setting<Sgd>("nesterov, first step", {.lr = 0.5, .momentum = 0.5, .nesterov = 1}, 1),
     {1, 0.5, 8},
     {0.625, 0.5, 0.5}},
    {make_setting<Sgd>("all of it", {.lr = 0.5, .momentum = 0.5, .dampening = 0.5, .weight_decay = 0.25, .nesterov = 1},
                       2),
     {1, 0.5, 1},
     {0.40625, 0.5, 0.875}},
    {make_setting<Sgd>("the first step forgets a NaN", {.lr = 0.5, .momentum = 0.5}, 1),
     {1, 0.5, nan},
     {0.75, 0.5, 0.5}},
    {make_setting<Sgd>("NaN gradient", {.lr = 0.5, .momentum = 0.5}, 2), {1, nan, 1}, {nan, nan, nan}},
    {make_setting<Sgd>("NaN parameter", {.lr = 0.5, .momentum = 0.5}, 2), {nan, 0.5, 1}, {nan, 0.5, 1}},
    {make_setting<Sgd>("NaN momentum", {.lr = 0.5, .momentum = 0.5}, 2), {1, 0.5, nan}, {nan, 0.5, nan}},

    {make_setting<Signum>("buffer is negative", {.lr = 0.25, .momentum = 0.5}, 1), {1, 2, -4}, {1.25, 2, -1}},
    {make_setting<Signum>("buffer is positive", {.lr = 0.25, .momentum = 0.5}, 1), {1, -2, 4}, {0.75, -2, 1}},
    {make_setting<Signum>("buffer is 0", {.lr = 0.25, .momentum = 0.5}, 1), {1, -2, 2}, {1, -2, 0}},
    {make_setting<Signum>("buffer is 0, with decay", {.lr = 0.25, .momentum = 0.5, .weight_decay = 0.5}, 1),
     {2, -2, 2},
     {1.75, -2, 0}},
    {make_setting<Signum>("NaN gradient", {.lr = 0.25, .momentum = 0.5}, 1), {1, nan, 1}, {nan, nan, nan}},

    // At step 1 the correction of m is 1/2, and so is that of the root of v.
    {make_setting<SparseAdam>("first step", {.lr = 0.25, .beta1 = 0.5, .beta2 = 0.75, .eps = 1}, 1),
     {1, 2, 0, 0},
     {0.875, 2, 1, 1}},
    {make_setting<SparseAdam>("averages", {.lr = 0.25, .beta1 = 0.5, .beta2 = 0.75, .eps = 7}, 1),
     {0, 4, 8, 28},
     {-0.125, 4, 6, 25}},
    {make_setting<SparseAdam>("zero gradient", {.lr = 0.25, .beta1 = 0.5, .beta2 = 0.75, .eps = 1}, 1),
     {1, 0, 2, 12},
     {0.9375, 0, 1, 9}},
    {make_setting<SparseAdam>("NaN gradient", {.lr = 0.25, .beta1 = 0.5, .beta2 = 0.75, .eps = 1}, 1),
     {1, nan, 0, 0},
     {nan, nan, nan, nan}},
    {make_setting<SparseAdam>("NaN exp_avg_sq", {.lr = 0.25, .beta1 = 0.5, .beta2 = 0.75, .eps = 1}, 1),
     {1, 2, 0, nan},
     {nan, 2, 1, nan}},
};

TEST_CASE_TEMPLATE("by hand", T, float, double) {
  for (Row row : kByHand) {
    CAPTURE(std::string_view(info_of(row.setting.rule).name));
    CAPTURE(row.setting.what);
    const Values got = update<T>(row.setting, row.before);
    for (std::size_t k = 0; k < operands_of(row.setting); ++k) {
      if (!uses(row.setting, k)) continue;
      CAPTURE(k);
      CHECK(std::isnan(got[k]) == std::isnan(row.after[k]));
      if (!std::isnan(row.after[k])) CHECK(got[k] == row.after[k]);
    }
  }
}

// -- whole runs ------------------------------------------------------------------------------------------------------

// The update at step t as the paper (for SGD and ASGD, torch's documentation) writes it, in the order of its equations.

void adadelta(const Adadelta::Hyper& h, double /*t*/, double& p, double g, double* state, double* /*scalar*/) {
  const double lr = h.lr, rho = h.rho, eps = h.eps, weight_decay = h.weight_decay;
  g += weight_decay * p;
  state[0] = rho * state[0] + (1 - rho) * g * g;
  const double delta = std::sqrt(state[1] + eps) / std::sqrt(state[0] + eps) * g;
  state[1] = rho * state[1] + (1 - rho) * delta * delta;
  p -= lr * delta;
}

void adagrad(const Adagrad::Hyper& h, double t, double& p, double g, double* state, double* /*scalar*/) {
  const double lr = h.lr / (1 + (t - 1) * h.lr_decay), eps = h.eps, weight_decay = h.weight_decay;
  const bool decoupled = h.decoupled_weight_decay != 0;
  if (!decoupled) g += weight_decay * p;
  if (decoupled) p -= lr * weight_decay * p;
  state[0] += g * g;
  p -= lr * g / (std::sqrt(state[0]) + eps);
}

void adam(const Adam::Hyper& h, double t, double& p, double g, double* state, double* /*scalar*/) {
  const double lr = h.lr, beta1 = h.beta1, beta2 = h.beta2, eps = h.eps, weight_decay = h.weight_decay;
  const bool amsgrad = h.amsgrad != 0, decoupled = h.decoupled_weight_decay != 0;
  if (!decoupled) g += weight_decay * p;
  if (decoupled) p -= lr * weight_decay * p;
  state[0] = beta1 * state[0] + (1 - beta1) * g;
  state[1] = beta2 * state[1] + (1 - beta2) * g * g;
  state[2] = std::fmax(state[2], state[1]);
  const double second = amsgrad ? state[2] : state[1];
  p -= lr * (state[0] / (1 - std::pow(beta1, t))) / (std::sqrt(second / (1 - std::pow(beta2, t))) + eps);
}

void adamax(const Adamax::Hyper& h, double t, double& p, double g, double* state, double* /*scalar*/) {
  const double lr = h.lr, beta1 = h.beta1, beta2 = h.beta2, eps = h.eps, weight_decay = h.weight_decay;
  g += weight_decay * p;
  state[0] = beta1 * state[0] + (1 - beta1) * g;
  state[1] = std::fmax(beta2 * state[1], std::fabs(g) + eps);
  p -= lr / (1 - std::pow(beta1, t)) * state[0] / state[1];
}

void adabelief(const AdaBelief::Hyper& h, double t, double& p, double g, double* state, double* /*scalar*/) {
  const double lr = h.lr, beta1 = h.beta1, beta2 = h.beta2, eps = h.eps, weight_decay = h.weight_decay;
  state[0] = beta1 * state[0] + (1 - beta1) * g;
  state[1] = beta2 * state[1] + (1 - beta2) * (g - state[0]) * (g - state[0]) + eps;
  p -= lr * weight_decay * p;
  p -= lr * (state[0] / (1 - std::pow(beta1, t))) / (std::sqrt(state[1] / (1 - std::pow(beta2, t))) + eps);
}

void adan(const Adan::Hyper& h, double t, double& p, double g, double* state, double* /*scalar*/) {
  const double lr = h.lr, beta1 = h.beta1, beta2 = h.beta2, beta3 = h.beta3, weight_decay = h.weight_decay;
  const double difference = t > 1 ? g + state[3] : 0;
  const double nesterov = g + beta2 * difference;
  state[0] = beta1 * state[0] + (1 - beta1) * g;
  state[1] = beta2 * state[1] + (1 - beta2) * difference;
  state[2] = beta3 * state[2] + (1 - beta3) * nesterov * nesterov;
  state[3] = -g;
  const double mean = state[0] / (1 - std::pow(beta1, t)) + beta2 * state[1] / (1 - std::pow(beta2, t));
  const double change = lr * mean / (std::sqrt(state[2] / (1 - std::pow(beta3, t))) + h.eps);
  if (h.no_prox != 0) {
    p = p * (1 - lr * weight_decay) - change;
  } else {
    p = (p - change) / (1 + lr * weight_decay);
  }
}

void ademamix(const AdEMAMix::Hyper& h, double t, double& p, double g, double* state, double* /*scalar*/) {
  const double lr = h.lr, beta1 = h.beta1, beta2 = h.beta2, eps = h.eps, weight_decay = h.weight_decay;
  const double alpha = t < h.alpha_warmup ? h.alpha * t / h.alpha_warmup : h.alpha;
  double beta3 = h.beta3;
  if (t < h.beta3_warmup) {  // the half-life is log(1/2) / log(beta)
    const double first = std::log(0.5) / std::log(beta1 + 1e-8);
    const double last = std::log(0.5) / std::log(beta3 + 1e-8);
    beta3 = std::exp(std::log(0.5) / (first + (last - first) * t / h.beta3_warmup));
  }
  state[0] = beta1 * state[0] + (1 - beta1) * g;
  state[1] = beta3 * state[1] + (1 - beta3) * g;
  state[2] = beta2 * state[2] + (1 - beta2) * g * g;
  const double mixed = state[0] / (1 - std::pow(beta1, t)) + alpha * state[1];
  p -= lr * (weight_decay * p + mixed / (std::sqrt(state[2] / (1 - std::pow(beta2, t))) + eps));
}

void adopt(const Adopt::Hyper& h, double t, double& p, double g, double* state, double* /*scalar*/) {
  const double lr = h.lr, beta1 = h.beta1, beta2 = h.beta2, eps = h.eps, weight_decay = h.weight_decay;
  const bool decoupled = h.decoupled_weight_decay != 0;
  if (!decoupled) g += weight_decay * p;
  if (t == 1) {
    state[0] = 0;
    state[1] = g * g;
    return;
  }
  double normalized = g / std::fmax(std::sqrt(state[1]), eps);
  const double limit = h.clip_exponent >= 0 ? std::pow(t - 1, h.clip_exponent) : infinity;
  normalized = std::fmin(std::fmax(normalized, -limit), limit);
  state[0] = beta1 * state[0] + (1 - beta1) * normalized;
  if (decoupled) p -= lr * weight_decay * p;
  p -= lr * state[0];
  state[1] = beta2 * state[1] + (1 - beta2) * g * g;
}

void asgd(const Asgd::Hyper& h, double t, double& p, double g, double* state, double* scalar) {
  const double lr = h.lr, lambd = h.lambd, alpha = h.alpha, t0 = h.t0, weight_decay = h.weight_decay;
  const double eta = scalar[0], mu = scalar[1];
  g += weight_decay * p;
  p *= 1 - lambd * eta;
  p -= eta * g;
  state[0] += mu * (p - state[0]);
  scalar[0] = lr / std::pow(1 + lambd * lr * t, alpha);
  scalar[1] = 1 / std::fmax(1, t - t0);
}

void lamb(const Lamb::Hyper& h, double t, double& p, double g, double* state, double* /*scalar*/) {
  state[0] = h.beta1 * state[0] + (1 - h.beta1) * g;
  state[1] = h.beta2 * state[1] + (1 - h.beta2) * g * g;
  const double m = state[0] / (1 - std::pow(h.beta1, t)), v = state[1] / (1 - std::pow(h.beta2, t));
  const double u = m / (std::sqrt(v) + h.eps) + h.weight_decay * p;
  double ratio = h.trust_ratio != 0 && p != 0 && u != 0 ? std::fabs(p) / std::fabs(u) : 1;
  if (h.trust_clip != 0) ratio = std::fmin(ratio, 1);
  p -= h.lr * ratio * u;
}

void laprop(const LaProp::Hyper& h, double t, double& p, double g, double* state, double* /*scalar*/) {
  const double lr = h.lr, beta1 = h.beta1, beta2 = h.beta2, eps = h.eps, weight_decay = h.weight_decay;
  state[1] = beta2 * state[1] + (1 - beta2) * g * g;
  state[0] = beta1 * state[0] + (1 - beta1) * g / (std::sqrt(state[1] / (1 - std::pow(beta2, t))) + eps);
  p -= lr * (weight_decay * p + state[0] / (1 - std::pow(beta1, t)));
}

void lars(const Lars::Hyper& h, double /*t*/, double& p, double g, double* state, double* /*scalar*/) {
  double ratio = 1;
  if (h.trust_ratio != 0 && p != 0 && g != 0)
    ratio = h.trust_coefficient * std::fabs(p) / (std::fabs(g) + h.weight_decay * std::fabs(p) + h.eps);
  g = ratio * (g + h.weight_decay * p);
  state[0] = h.momentum * state[0] + g;
  p -= h.lr * (h.nesterov != 0 ? g + h.momentum * state[0] : state[0]);
}

void lion(const Lion::Hyper& h, double /*t*/, double& p, double g, double* state, double* /*scalar*/) {
  const double lr = h.lr, beta1 = h.beta1, beta2 = h.beta2, weight_decay = h.weight_decay;
  const double c = beta1 * state[0] + (1 - beta1) * g;
  p -= lr * ((c > 0) - (c < 0) + weight_decay * p);
  state[0] = beta2 * state[0] + (1 - beta2) * g;
}

void muon(const Muon::Hyper& h, double /*t*/, double& p, double g, double* /*state*/, double* /*scalar*/) {
  if (!(h.cautious_weight_decay > 0 && g * p < 0)) p -= h.decay * p;
  p -= h.adjusted_lr * g;
}

void muon_momentum(const MuonMomentum::Hyper& h, double /*t*/, double& p, double g, double* state, double* /*scalar*/) {
  const double momentum = h.momentum;
  state[0] = momentum * state[0] + (1 - momentum) * g;
  p = h.nesterov != 0 ? (1 - momentum) * g + momentum * state[0] : state[0];
}

void mars(const Mars::Hyper& h, double t, double& p, double g, double* state, double* /*scalar*/) {
  double c = g;
  if (t > 1) c += h.gamma * h.beta1 / (1 - h.beta1) * (g - state[2]);
  if (h.clip_correction != 0) c /= std::fmax(1, std::fabs(c));
  state[0] = h.beta1 * state[0] + (1 - h.beta1) * c;
  state[1] = h.beta2 * state[1] + (1 - h.beta2) * c * c;
  const double m = state[0] / (1 - std::pow(h.beta1, t));
  const double v = state[1] / (1 - std::pow(h.beta2, t));
  p -= h.lr * (m / (std::sqrt(v) + h.eps) + h.weight_decay * p);
  state[2] = g;
}

void nadam(const Nadam::Hyper& h, double t, double& p, double g, double* state, double* scalar) {
  const double lr = h.lr, beta1 = h.beta1, beta2 = h.beta2, eps = h.eps, weight_decay = h.weight_decay;
  const bool decoupled = h.decoupled_weight_decay != 0;
  const auto mu = [&](double step) { return beta1 * (1 - std::pow(0.96, step * h.momentum_decay) / 2); };
  if (!decoupled) g += weight_decay * p;
  if (decoupled) p -= lr * weight_decay * p;
  scalar[0] *= mu(t);
  state[0] = beta1 * state[0] + (1 - beta1) * g;
  state[1] = beta2 * state[1] + (1 - beta2) * g * g;
  const double nesterov = mu(t + 1) * state[0] / (1 - scalar[0] * mu(t + 1)) + (1 - mu(t)) * g / (1 - scalar[0]);
  p -= lr * nesterov / (std::sqrt(state[1] / (1 - std::pow(beta2, t))) + eps);
}

void novograd(const NovoGrad::Hyper& h, double /*t*/, double& p, double g, double* state, double* scalar) {
  double& v = scalar[0];
  v = v == 0 ? g * g : h.beta2 * v + (1 - h.beta2) * (g * g);
  const double share = h.grad_averaging != 0 ? 1 - h.beta1 : 1;
  state[0] = h.beta1 * state[0] + share * (g / (std::sqrt(v) + h.eps) + h.weight_decay * p);
  p -= h.lr * state[0];
}

void prodigy(const Prodigy::Hyper& h, double t, double& p, double g, double* state, double* scalar) {
  const double beta3 = h.beta3 < 0 ? std::sqrt(h.beta2) : h.beta3;
  double rate = h.d * h.lr;
  if (h.use_bias_correction != 0) rate *= std::sqrt(1 - std::pow(h.beta2, t)) / (1 - std::pow(h.beta1, t));
  if (h.decouple == 0) g += h.weight_decay * p;
  if (h.slice_p == 1) {
    scalar[0] = beta3 * scalar[0] + h.d / h.d0 * rate * g * (state[3] - p);
    state[2] = beta3 * state[2] + h.d / h.d0 * (h.safeguard_warmup != 0 ? h.d : rate) * g;
    scalar[1] = std::fabs(state[2]);
  }
  state[0] = h.beta1 * state[0] + (1 - h.beta1) * h.d * g;
  state[1] = h.beta2 * state[1] + (1 - h.beta2) * h.d * h.d * g * g;
  if (h.decouple != 0) p -= rate * h.weight_decay * p;
  p -= rate * state[0] / (std::sqrt(state[1]) + h.d * h.eps);
}

void radam(const Radam::Hyper& h, double t, double& p, double g, double* state, double* /*scalar*/) {
  const double lr = h.lr, beta1 = h.beta1, beta2 = h.beta2, eps = h.eps, weight_decay = h.weight_decay;
  const bool decoupled = h.decoupled_weight_decay != 0;
  if (!decoupled) g += weight_decay * p;
  if (decoupled) p -= lr * weight_decay * p;
  state[0] = beta1 * state[0] + (1 - beta1) * g;
  state[1] = beta2 * state[1] + (1 - beta2) * g * g;
  const double first = state[0] / (1 - std::pow(beta1, t));
  const double most = 2 / (1 - beta2) - 1;
  const double length = most - 2 * t * std::pow(beta2, t) / (1 - std::pow(beta2, t));
  if (length > 5) {
    const double adaptive = std::sqrt(1 - std::pow(beta2, t)) / (std::sqrt(state[1]) + eps);
    p -= lr * first * adaptive * std::sqrt((length - 4) * (length - 2) * most / ((most - 4) * (most - 2) * length));
  } else {
    p -= lr * first;
  }
}

void rmsprop(const Rmsprop::Hyper& h, double /*t*/, double& p, double g, double* state, double* /*scalar*/) {
  const double lr = h.lr, alpha = h.alpha, eps = h.eps, weight_decay = h.weight_decay, momentum = h.momentum;
  g += weight_decay * p;
  state[0] = alpha * state[0] + (1 - alpha) * g * g;
  state[2] = h.centered != 0 ? alpha * state[2] + (1 - alpha) * g : 0;
  state[1] = momentum * state[1] + g / (std::sqrt(state[0] - state[2] * state[2]) + eps);
  p -= lr * state[1];
}

void rprop(const Rprop::Hyper& h, double /*t*/, double& p, double g, double* state, double* /*scalar*/) {
  if (g * state[0] > 0) state[1] *= h.eta_plus;
  if (g * state[0] < 0) state[1] *= h.eta_minus;
  state[1] = std::fmin(std::fmax(state[1], h.smallest), h.largest);
  if (g * state[0] < 0) g = 0;
  p -= ((g > 0) - (g < 0)) * state[1];
  state[0] = g;
}

// Schedule-Free: from the gradient at y, the change of z, with the rate of this step. Keeps x only for the length of
// the step.
void schedule_free(double momentum, double r, double power, double lr, double change, double t, double& y, double& z,
                   double* scalar) {
  const double x = (y - (1 - momentum) * z) / momentum;
  scalar[0] = std::fmax(scalar[0], lr);
  const double weight = std::pow(t, r) * std::pow(scalar[0], power);
  scalar[1] += weight;
  const double c = scalar[1] > 0 ? weight / scalar[1] : 0;
  z -= lr * change;
  y = (1 - momentum) * z + momentum * ((1 - c) * x + c * z);
}

void schedule_free_adamw(const ScheduleFreeAdamW::Hyper& h, double t, double& p, double g, double* state,
                         double* scalar) {
  state[1] = h.beta2 * state[1] + (1 - h.beta2) * g * g;
  const double lr = h.warmup_steps > 0 ? h.lr * std::fmin(1, t / h.warmup_steps) : h.lr;
  const double change = g / (std::sqrt(state[1] / (1 - std::pow(h.beta2, t))) + h.eps) + h.weight_decay * p;
  schedule_free(h.beta1, h.r, h.weight_lr_power, lr, change, t, p, state[0], scalar);
}

void schedule_free_radam(const ScheduleFreeRadam::Hyper& h, double t, double& p, double g, double* state,
                         double* scalar) {
  state[1] = h.beta2 * state[1] + (1 - h.beta2) * g * g;
  const double power = std::pow(h.beta2, t), rho = 2 / (1 - h.beta2) - 1, rho_t = rho - 2 * t * power / (1 - power);
  double lr = h.silent_sgd_phase != 0 ? 0 : h.lr;
  if (rho_t > 4) {
    lr = h.lr * std::sqrt((rho_t - 4) * (rho_t - 2) * rho / ((rho - 4) * (rho - 2) * rho_t));
    g /= std::sqrt(state[1] / (1 - power)) + h.eps;
  }
  schedule_free(h.beta1, h.r, h.weight_lr_power, lr, g + h.weight_decay * p, t, p, state[0], scalar);
}

void schedule_free_sgd(const ScheduleFreeSgd::Hyper& h, double t, double& p, double g, double* state, double* scalar) {
  const double lr = h.warmup_steps > 0 ? h.lr * std::fmin(1, t / h.warmup_steps) : h.lr;
  schedule_free(h.momentum, h.r, h.weight_lr_power, lr, g + h.weight_decay * p, t, p, state[0], scalar);
}

void sgd(const Sgd::Hyper& h, double t, double& p, double g, double* state, double* /*scalar*/) {
  const double lr = h.lr, momentum = h.momentum, dampening = h.dampening, weight_decay = h.weight_decay;
  g += weight_decay * p;
  if (momentum != 0) {
    state[0] = t == 1 ? g : momentum * state[0] + (1 - dampening) * g;
    g = h.nesterov != 0 ? g + momentum * state[0] : state[0];
  }
  p -= lr * g;
}

void signum(const Signum::Hyper& h, double /*t*/, double& p, double g, double* state, double* /*scalar*/) {
  const double lr = h.lr, momentum = h.momentum, weight_decay = h.weight_decay;
  state[0] = momentum * state[0] + (1 - momentum) * g;
  p -= lr * weight_decay * p + lr * ((state[0] > 0) - (state[0] < 0));
}

void sparse_adam(const SparseAdam::Hyper& h, double t, double& p, double g, double* state, double* /*scalar*/) {
  const double lr = h.lr, beta1 = h.beta1, beta2 = h.beta2, eps = h.eps;
  state[0] = beta1 * state[0] + (1 - beta1) * g;
  state[1] = beta2 * state[1] + (1 - beta2) * g * g;
  const double rate = lr * std::sqrt(1 - std::pow(beta2, t)) / (1 - std::pow(beta1, t));
  p -= rate * state[0] / (std::sqrt(state[1]) + eps);
}

void stable_adamw(const StableAdamW::Hyper& h, double t, double& p, double g, double* state, double* /*scalar*/) {
  const double beta1 = h.beta1 * (1 - std::pow(h.beta1, t - 1)) / (1 - std::pow(h.beta1, t));
  const double beta2 = h.beta2 * (1 - std::pow(h.beta2, t - 1)) / (1 - std::pow(h.beta2, t));
  state[0] = beta1 * state[0] + (1 - beta1) * g;
  state[1] = beta2 * state[1] + (1 - beta2) * g * g;
  const double rms = std::sqrt(g * g / std::fmax(state[1], h.eps * h.eps));
  p -= h.lr / std::fmax(1, rms) * (h.weight_decay * p + state[0] / (std::sqrt(state[1]) + h.eps));
}

// A step that masks the update u and the weight decay. `formula(hyper, p, g)` is one without masks. The parameter is
// the only element of its tensor. With p = 0 and without weight decay, a step leaves -u.
template <class Hyper, class Formula>
void masked(const Hyper& h, double t, double& p, double g, Formula&& formula) {
  bool decoupled = false, shrinks = false, cautious_weight_decay = false;
  if constexpr (requires { h.cautious_weight_decay; }) {
    decoupled = true;
    cautious_weight_decay = h.cautious_weight_decay > 0;
  }
  if constexpr (requires { h.decoupled_weight_decay; }) decoupled = h.decoupled_weight_decay != 0;
  if constexpr (requires { h.no_prox; }) shrinks = h.no_prox == 0;
  const double weight_decay = h.weight_decay;
  if (!decoupled) g += weight_decay * p;
  Hyper without_decay = h;
  without_decay.weight_decay = 0;
  double minus_u = 0;
  formula(without_decay, minus_u, g);
  const double u = -minus_u;
  const double decay = decoupled && !(cautious_weight_decay && u * p < 0) ? h.lr * weight_decay : 0;
  if (std::is_same_v<Hyper, Adopt::Hyper> && t == 1) return;  // which only sets the average
  const double change = h.cautious > 0 && !(u * g > 0) ? 0 : u;
  p = shrinks ? (p - change) / (1 + decay) : p - decay * p - change;
}

// One step of a setting, at setting.step.
void step_by_formula(const Setting& setting, double& p, double g, double* state, double* scalar) {
  const auto step = [&]<class Hyper>(Hyper h, auto&& formula) {
    std::memcpy(&h, setting.hyper.data(), sizeof h);
    const auto unmasked = [&](const Hyper& own, double& param, double grad) {
      formula(own, setting.step, param, grad, state, scalar);
    };
    bool masks = false;
    if constexpr (requires { h.cautious; }) masks = h.cautious > 0;
    if constexpr (requires { h.cautious_weight_decay; }) masks = masks || h.cautious_weight_decay > 0;
    if constexpr (requires { h.cautious; })
      if (masks) return masked(h, setting.step, p, g, unmasked);
    unmasked(h, p, g);
  };
  switch (setting.rule) {
#define ONEPASS_X(name, Type) \
  case RuleId::name:          \
    return step(Type::Hyper{}, name);
    ONEPASS_RULES(ONEPASS_X)
#undef ONEPASS_X
  }
}

TEST_CASE_TEMPLATE("a run of every setting follows the formulas", T, float, double) {
  // Well above the rounding errors of 20 steps, and far below the effect of a wrong coefficient.
  const double tolerance = sizeof(T) == 8 ? 1e-13 : 1e-5;
  static constexpr double gradients[] = {0.5, -0.25, 3.0, 0.125, -2.0};
  for (Setting setting : kSettings) {
    CAPTURE(setting.what);
    const bool starts = setting.step == 1;
    Values values{1.5};
    double p = 1.5;
    double state[kMaxStates] = {};
    std::array<double, kMaxScalars> scalars = setting.scalars;
    for (int t = 1; t <= 20; ++t) {
      CAPTURE(t);
      setting.step = info_of(setting.rule).counts_steps ? t : (starts && t == 1 ? 1 : 2);
      const double g = gradients[t % 5];
      values[kGrad] = g;
      values = update<T>(setting, values);
      step_by_formula(setting, p, g, state, scalars.data());
      CHECK(std::fabs(values[kParam] - p) <= tolerance * std::fabs(p));
      for (std::size_t n = 0; n < kMaxScalars; ++n) {  // to the bit, unless they depend on elements
        const double room = info_of(setting.rule).sums > 0 ? tolerance * std::fabs(scalars[n]) : 0.0;
        CHECK(std::fabs(setting.scalars[n] - scalars[n]) <= room);
      }
      for (std::size_t k = kFirstState; k < operands_of(setting); ++k)
        if (uses(setting, k))
          CHECK(std::fabs(values[k] - state[k - kFirstState]) <= tolerance * std::fabs(state[k - kFirstState]));
    }
  }
}

// -- the table -------------------------------------------------------------------------------------------------------

TEST_CASE("every rule is tested, with each set of states it can have") {
  for (int rule = 0; rule < kRules; ++rule) {
    const auto id = static_cast<RuleId>(rule);
    CAPTURE(std::string_view(info_of(id).name));
    std::vector<unsigned> tested;
    for (const Setting& setting : kSettings)
      if (setting.rule == id) tested.push_back(states_used(setting));
    with_rule(id, [&]<class Rule>() {
      for (const unsigned set : Rule::state_sets) CHECK(std::ranges::find(tested, set) != tested.end());
      for (const unsigned set : tested) CHECK(std::ranges::find(Rule::state_sets, set) != Rule::state_sets.end());
    });
  }
}

TEST_CASE("names, in the order of the operands, hyperparameters and scalars") {
  using Names = std::vector<std::string>;
  struct {
    RuleId rule;
    Names hyper, states, scalars;
    bool counts_steps;
  } const table[] = {
      {RuleId::adadelta, {"lr", "rho", "eps", "weight_decay"}, {"square_avg", "acc_delta"}, {}, true},
      {RuleId::adabelief,
       {"lr", "betas[0]", "betas[1]", "eps", "weight_decay", "cautious?", "cautious_weight_decay?"},
       {"exp_avg", "exp_avg_var"},
       {},
       true},
      {RuleId::adagrad, {"lr", "lr_decay", "eps", "weight_decay", "decoupled_weight_decay?"}, {"sum"}, {}, true},
      {RuleId::adam,
       {"lr", "betas[0]", "betas[1]", "eps", "weight_decay", "amsgrad!", "decoupled_weight_decay!", "cautious?",
        "cautious_weight_decay?"},
       {"exp_avg", "exp_avg_sq", "max_exp_avg_sq"},
       {},
       true},
      {RuleId::adamax,
       {"lr", "betas[0]", "betas[1]", "eps", "weight_decay", "cautious?"},
       {"exp_avg", "exp_inf"},
       {},
       true},
      {RuleId::adan,
       {"lr", "betas[0]", "betas[1]", "betas[2]", "eps", "weight_decay", "no_prox!", "cautious?",
        "cautious_weight_decay?"},
       {"exp_avg", "exp_avg_diff", "exp_avg_sq", "neg_pre_grad"},
       {},
       true},
      {RuleId::ademamix,
       {"lr", "betas[0]", "betas[1]", "betas[2]", "alpha", "beta3_warmup?", "alpha_warmup?", "eps", "weight_decay",
        "cautious?", "cautious_weight_decay?"},
       {"exp_avg", "exp_avg_slow", "exp_avg_sq"},
       {},
       true},
      {RuleId::adopt,
       {"lr", "betas[0]", "betas[1]", "eps", "weight_decay", "clip_exponent?", "decoupled_weight_decay!", "cautious?",
        "cautious_weight_decay?"},
       {"exp_avg", "exp_avg_sq"},
       {},
       true},
      {RuleId::asgd, {"lr", "lambd", "alpha", "t0", "weight_decay"}, {"ax"}, {"eta", "mu"}, true},
      {RuleId::lamb,
       {"lr", "betas[0]", "betas[1]", "eps", "weight_decay", "trust_ratio!", "trust_clip!"},
       {"exp_avg", "exp_avg_sq"},
       {},
       true},
      {RuleId::laprop,
       {"lr", "betas[0]", "betas[1]", "eps", "weight_decay", "cautious?", "cautious_weight_decay?"},
       {"exp_avg", "exp_avg_sq"},
       {},
       true},
      {RuleId::lars,
       {"lr", "momentum", "weight_decay", "trust_coefficient", "eps", "nesterov!", "trust_ratio!"},
       {"momentum_buffer"},
       {},
       false},
      {RuleId::lion,
       {"lr", "betas[0]", "betas[1]", "weight_decay", "cautious?", "cautious_weight_decay?"},
       {"exp_avg"},
       {},
       false},
      {RuleId::mars,
       {"lr", "betas[0]", "betas[1]", "eps", "weight_decay", "gamma", "clip_correction!"},
       {"exp_avg", "exp_avg_sq", "last_grad"},
       {},
       true},
      {RuleId::muon, {"decay", "adjusted_lr", "cautious_weight_decay?"}, {}, {}, false},
      {RuleId::muon_momentum, {"momentum", "nesterov!"}, {"momentum_buffer"}, {}, false},
      {RuleId::nadam,
       {"lr", "betas[0]", "betas[1]", "eps", "weight_decay", "momentum_decay", "decoupled_weight_decay!", "cautious?",
        "cautious_weight_decay?"},
       {"exp_avg", "exp_avg_sq"},
       {"mu_product"},
       true},
      {RuleId::novograd,
       {"lr", "betas[0]", "betas[1]", "eps", "weight_decay", "grad_averaging!"},
       {"exp_avg"},
       {"exp_avg_norm_sq"},
       true},
      {RuleId::prodigy,
       {"lr", "betas[0]", "betas[1]", "beta3?", "eps", "weight_decay", "d", "d0", "decouple!", "use_bias_correction!",
        "safeguard_warmup!", "slice_p"},
       {"exp_avg", "exp_avg_sq", "s", "p0"},
       {"d_numerator", "d_denom"},
       true},
      {RuleId::radam,
       {"lr", "betas[0]", "betas[1]", "eps", "weight_decay", "decoupled_weight_decay!", "cautious?",
        "cautious_weight_decay?"},
       {"exp_avg", "exp_avg_sq"},
       {},
       true},
      {RuleId::rmsprop,
       {"lr", "alpha", "eps", "weight_decay", "momentum", "centered!", "cautious?"},
       {"square_avg", "momentum_buffer", "grad_avg"},
       {},
       true},
      {RuleId::rprop, {"etas[0]", "etas[1]", "step_sizes[0]", "step_sizes[1]"}, {"prev", "step_size"}, {}, true},
      {RuleId::schedule_free_adamw,
       {"lr", "betas[0]", "betas[1]", "eps", "weight_decay", "warmup_steps", "r", "weight_lr_power"},
       {"z", "exp_avg_sq"},
       {"lr_max", "weight_sum"},
       true},
      {RuleId::schedule_free_radam,
       {"lr", "betas[0]", "betas[1]", "eps", "weight_decay", "r", "weight_lr_power", "silent_sgd_phase!"},
       {"z", "exp_avg_sq"},
       {"lr_max", "weight_sum"},
       true},
      {RuleId::schedule_free_sgd,
       {"lr", "momentum", "weight_decay", "warmup_steps", "r", "weight_lr_power"},
       {"z"},
       {"lr_max", "weight_sum"},
       true},
      {RuleId::sgd,
       {"lr", "momentum", "dampening", "weight_decay", "nesterov!", "cautious?"},
       {"momentum_buffer"},
       {},
       false},
      {RuleId::signum,
       {"lr", "momentum", "weight_decay", "cautious?", "cautious_weight_decay?"},
       {"momentum_buffer"},
       {},
       false},
      {RuleId::sparse_adam, {"lr", "betas[0]", "betas[1]", "eps"}, {"exp_avg", "exp_avg_sq"}, {}, true},
      {RuleId::stable_adamw,
       {"lr", "betas[0]", "betas[1]", "eps", "weight_decay"},
       {"exp_avg", "exp_avg_sq"},
       {},
       true},
  };
  CHECK(std::size(table) == kRules);
  for (const auto& row : table) {
    const RuleInfo& info = info_of(row.rule);
    CHECK(Names(info.hyper_names.begin(), info.hyper_names.end()) == row.hyper);
    CHECK(Names(info.state_names.begin(), info.state_names.end()) == row.states);
    CHECK(Names(info.scalar_names.begin(), info.scalar_names.end()) == row.scalars);
    CHECK(info.counts_steps == row.counts_steps);
  }
}

TEST_CASE("rules are found by their names") {
  static constexpr std::pair<RuleId, const char*> rules[] = {
#define ONEPASS_X(name, Type) {RuleId::name, #name},
      ONEPASS_RULES(ONEPASS_X)
#undef ONEPASS_X
  };
  for (const auto& [rule, name] : rules) {
    CHECK(std::string(info_of(rule).name) == name);
    CHECK(find_rule(name) == rule);
  }
  CHECK_THROWS_AS(find_rule("adamw"), std::invalid_argument);
  CHECK_THROWS_AS(find_rule("adafactor"), std::invalid_argument);
}

TEST_CASE("states in use") {
  struct {
    Setting setting;
    std::vector<std::string> states;
  } const table[] = {
      {make_setting<Sgd>("sgd", {.lr = 0.1}, 1), {}},
      {make_setting<Sgd>("sgd", {.lr = 0.1, .momentum = 0.9}, 1), {"momentum_buffer"}},
      {make_setting<Adam>("adam", {.lr = 0.1, .beta1 = 0.9, .beta2 = 0.99, .decoupled_weight_decay = 1.0}, 1),
       {"exp_avg", "exp_avg_sq"}},
      {make_setting<Adam>("adam", {.lr = 0.1, .beta1 = 0.9, .beta2 = 0.99, .amsgrad = 1.0}, 1),
       {"exp_avg", "exp_avg_sq", "max_exp_avg_sq"}},
      {make_setting<Lion>("lion", {.lr = 0.1}, 1), {"exp_avg"}},
      {make_setting<Rmsprop>("rmsprop", {.lr = 0.1, .alpha = 0.9}, 1), {"square_avg"}},
      {make_setting<Rmsprop>("rmsprop", {.lr = 0.1, .alpha = 0.9, .momentum = 0.9}, 1),
       {"square_avg", "momentum_buffer"}},
      {make_setting<Rmsprop>("rmsprop", {.lr = 0.1, .alpha = 0.9, .centered = 1.0}, 1), {"square_avg", "grad_avg"}},
      {make_setting<Rmsprop>("rmsprop", {.lr = 0.1, .alpha = 0.9, .momentum = 0.9, .centered = 1.0}, 1),
       {"square_avg", "momentum_buffer", "grad_avg"}},
  };
  for (const auto& [setting, states] : table) {
    CAPTURE(setting.what);
    std::vector<std::string> used;
    for (std::size_t k = kFirstState; k < operands_of(setting); ++k)
      if (uses(setting, k)) used.emplace_back(info_of(setting.rule).state_names[k - kFirstState]);
    CHECK(used == states);
  }
}

TEST_CASE("gradients that a step takes") {
  struct {
    Setting setting;
    bool sparse;
    bool dense = true;
  } const table[] = {
      {make_setting<Sgd>("sgd", {.lr = 0.1}, 1), true},
      {make_setting<Sgd>("sgd", {.lr = 0.1, .momentum = 0.9}, 1), false},
      {make_setting<Sgd>("sgd", {.lr = 0.1, .weight_decay = 0.1}, 1), false},
      {make_setting<Adagrad>("adagrad", {.lr = 0.1, .lr_decay = 0.1}, 1), true},
      {make_setting<Adagrad>("adagrad", {.lr = 0.1, .lr_decay = 0.1, .weight_decay = 0.1}, 1), false},
      {make_setting<Adagrad>("adagrad",
                             {.lr = 0.1, .lr_decay = 0.1, .weight_decay = 0.1, .decoupled_weight_decay = 1.0}, 1),
       true},
      {make_setting<Adam>("adam", {.lr = 0.1, .beta1 = 0.9, .beta2 = 0.99}, 1), false},
      {make_setting<Adam>(
           "adam",
           {.lr = 0.1, .beta1 = 0.9, .beta2 = 0.99, .weight_decay = 0.1, .amsgrad = 1.0, .decoupled_weight_decay = 1.0},
           1),
       true},
      {make_setting<Lion>("lion", {.lr = 0.1, .beta1 = 0.9, .beta2 = 0.99, .weight_decay = 0.1}, 1), true},
      {make_setting<Signum>("signum", {.lr = 0.1, .momentum = 0.9, .weight_decay = 0.1}, 1), true},
      {make_setting<SparseAdam>("sparse_adam", {.lr = 0.1, .beta1 = 0.9, .beta2 = 0.99, .eps = 1e-8}, 1), true, false},
      {make_setting<AdaBelief>("adabelief", {}, 1), false},
      {make_setting<Adan>("adan", {}, 1), false},
      {make_setting<AdEMAMix>("ademamix", {}, 1), false},
      {make_setting<Adopt>("adopt", {}, 1), false},
      {make_setting<LaProp>("laprop", {}, 1), false},
      {make_setting<Adadelta>("adadelta", {}, 1), false},
      {make_setting<Adamax>("adamax", {}, 1), false},
      {make_setting<Asgd>("asgd", {}, 1), false},
      {make_setting<Nadam>("nadam", {}, 1), false},
      {make_setting<Radam>("radam", {}, 1), false},
      {make_setting<Rmsprop>("rmsprop", {}, 1), false},
      {make_setting<Rprop>("rprop", {}, 1), false},
  };
  for (const auto& [setting, sparse, dense] : table) {
    CAPTURE(setting.what);
    CHECK(info_of(setting.rule).takes_sparse(setting.hyper.data()) == sparse);
    CHECK(info_of(setting.rule).takes_dense == dense);
  }
}

// -- adafactor and came, which have a driver of their own -------------------------------------------------------------

TEST_CASE("adafactor's constants") {
  const RuleInfo& info = adafactor_info();
  const std::vector<std::string> hyper(info.hyper_names.begin(), info.hyper_names.end());
  CHECK(hyper == std::vector<std::string>{"lr", "beta2_decay", "eps[0]?", "eps[1]", "d", "weight_decay"});
  CHECK(info.counts_steps);
  AdafactorConstants c;
  const auto values = doubles_of<kMaxHyper>(
      AdafactorHyper{.lr = 0.25, .beta2_decay = -0.5, .eps1 = -1.0, .eps2 = 0.125, .d = 2.0, .weight_decay = 0.5});
  info.prepare(values.data(), 4.0, nullptr, false, &c);
  CHECK(c.weight == 0.5);
  CHECK(c.rate == 0.25);
  CHECK(c.decay == 0.125);
  CHECK(c.eps1 == -1.0);
  info.prepare(values.data(), 64.0, nullptr, true, &c);
  CHECK(c.rate == 0.125);

  CHECK(Adafactor::step_size(c, 3.0, 1.0) == 3.0 * 0.125);        // as large as the parameter
  CHECK(Adafactor::step_size(c, 0.0625, 1.0) == 0.125 * 0.125);   // eps2 at least
  CHECK(Adafactor::step_size(c, 3.0, 8.0) == 3.0 * 0.125 / 4.0);  // clipped to an rms of d
  CHECK(Adafactor::step_size(c, nan, nan) == 0.125 * 0.125);
  CHECK(Adafactor::step_size(c, 3.0, infinity) == 0.0);
}

TEST_CASE_TEMPLATE("adafactor's update", T, float, double) {
  CHECK(Adafactor::inverse_root(T(16)) == T(0.25));
  CHECK(Adafactor::update(T(3), T(0.25), T(2)) == T(0.75));
  CHECK(Adafactor::update(T(3), T(4), T(2)) == T(6));
  CHECK(Adafactor::update(T(3), Adafactor::inverse_root(T(0)), T(2)) == T(6));
  CHECK(std::isnan(Adafactor::update(T(3), T(nan), T(2))));
  CHECK(Adafactor::row_scale(T(16), T(1)) == T(4));
  CHECK(Adafactor::row_scale(T(0.5), T(4)) == T(2));
  CHECK(std::isnan(Adafactor::row_scale(T(nan), T(4))));
  CHECK(Adafactor::apply(T(2), T(3), T(0.5), Flag<T>(true), T(0.25)) == T(0));
  CHECK(Adafactor::apply(T(2), T(3), T(0.5), Flag<T>(false), T(0.25)) == T(0.5));
}

TEST_CASE("came's constants") {
  const RuleInfo& info = came_info();
  const std::vector<std::string> hyper(info.hyper_names.begin(), info.hyper_names.end());
  CHECK(hyper == std::vector<std::string>{"lr", "betas[0]", "betas[1]", "betas[2]", "eps[0]", "eps[1]",
                                          "clip_threshold", "weight_decay"});
  const std::vector<std::string> states(info.state_names.begin(), info.state_names.end());
  CHECK(states == std::vector<std::string>{"exp_avg_sq_row", "exp_avg_sq_col", "exp_avg_sq", "exp_avg",
                                           "exp_avg_res_row", "exp_avg_res_col"});
  CHECK(Came::kOfMatrix == 0b111011);
  CHECK(Came::kOfVector == 0b001100);
  CHECK(!info.counts_steps);
  CameConstants c;
  const auto values = doubles_of<kMaxHyper>(CameHyper{.lr = 0.5,
                                                      .beta1 = 0.75,
                                                      .beta2 = 0.875,
                                                      .beta3 = 0.9375,
                                                      .eps1 = 2.0,
                                                      .eps2 = 3.0,
                                                      .clip_threshold = 4.0,
                                                      .weight_decay = 0.25});
  info.prepare(values.data(), 1.0, nullptr, false, &c);
  CHECK(c.lr == 0.5);
  CHECK(c.decay == 0.125);
  CHECK(c.momentum_weight == 0.25);
  CHECK(c.square_weight == 0.125);
  CHECK(c.residual_weight == 0.0625);
  CHECK(c.eps1 == 2.0);
  CHECK(c.eps2 == 3.0);
  CHECK(Came::clipping(c, 2.0) == 1.0);
  CHECK(Came::clipping(c, 8.0) == 0.5);
  CHECK(Came::clipping(c, nan) == 1.0);
  CHECK(Came::clipping(c, infinity) == 0.0);
  const auto no_threshold = doubles_of<kMaxHyper>(CameHyper{});
  CHECK(std::string_view(info.zero_divisor(no_threshold.data(), 1.0, nullptr)) == "clip_threshold");
}

// Constants are computed in double and rounded once, at the end: T(1.0 - 0.9) is not T(1) - T(0.9).
TEST_CASE_TEMPLATE("prepare", T, float, double) {
  struct {
    Setting setting;
    Values before;
    std::size_t operand;
    T want;
  } const table[] = {
      {make_setting<Sgd>("lr", {.lr = 0.1}, 2), {0, 1}, kParam, -T(0.1)},
      {make_setting<Sgd>("momentum", {.momentum = 0.9}, 2), {0, 0, 1}, kFirstState, T(0.9)},
      {make_setting<Sgd>("dampening", {.momentum = 0.9, .dampening = 0.3}, 2), {0, 1, 0}, kFirstState, T(1.0 - 0.3)},
      {make_setting<Sgd>("weight_decay", {.lr = 1, .weight_decay = 0.7}, 2), {1, 0}, kParam, T(1) - T(0.7)},
      {make_setting<Adam>("beta1", {.beta1 = 0.9, .eps = 1}, 1), {0, 1, 0, 0}, kFirstState, T(1.0 - 0.9)},
      {make_setting<Adam>("beta2", {.beta1 = 0.9, .beta2 = 0.99, .eps = 1}, 1),
       {0, 1, 0, 0},
       kFirstState + 1,
       T(1.0 - 0.99)},
      {make_setting<Adam>("small beta", {.beta1 = 0.3, .eps = 1}, 1), {0, 0, 1, 0}, kFirstState, T(0.3)},
      {make_setting<Adam>("lr, bias correction, eps", {.lr = 0.1, .beta2 = 0.99, .eps = 0.3}, 3),
       {0, 1, 0, 1},
       kParam,
       -(T(0.1 * std::sqrt(1.0 - std::pow(0.99, 3))) / (T(1) + T(0.3 * std::sqrt(1.0 - std::pow(0.99, 3)))))},
      {make_setting<Adam>("lr * weight_decay", {.lr = 0.1, .eps = 1, .weight_decay = 0.7, .decoupled_weight_decay = 1},
                          1),
       {1, 0, 0, 0},
       kParam,
       T(1) - T(0.1 * 0.7)},
      {make_setting<Lion>("lr", {.lr = 0.1, .beta1 = 0.9, .beta2 = 0.99}, 1), {0, 1, 0}, kParam, -T(0.1)},
      {make_setting<Lion>("beta2", {.lr = 0.1, .beta1 = 0.9, .beta2 = 0.99}, 1), {0, 1, 0}, kFirstState, T(1.0 - 0.99)},
      {make_setting<Lion>("lr * weight_decay", {.lr = 0.1, .weight_decay = 0.7}, 1),
       {1, 0, 0},
       kParam,
       T(1) - T(0.1 * 0.7)},
  };
  for (auto [setting, before, operand, want] : table) {
    CAPTURE(setting.what);
    CHECK(update<T>(setting, before)[operand] == static_cast<double>(want));
  }
}

}  // namespace
}  // namespace onepass::testing
