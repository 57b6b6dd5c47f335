// The rules as mathematics: values worked out by hand, and whole runs against the formulas of the papers.
#include <doctest/doctest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "cases.h"
#include "rules/adafactor.h"

namespace onepass::testing {
namespace {

constexpr double nan = std::numeric_limits<double>::quiet_NaN();
constexpr double infinity = std::numeric_limits<double>::infinity();

using Values = std::array<double, kMaxOperands>;  // parameter, gradient, states

// One update in arithmetic T.
template <class T>
Values update(const Setting& setting, Values values) {
  const Constants constants(setting, sizeof(T) == 8);
  T v[kMaxOperands] = {};
  for (std::size_t k = 0; k < values.size(); ++k) v[k] = static_cast<T>(values[k]);
  with_rule(setting.rule, [&]<class Rule>() {
    [&]<std::size_t... I>(std::index_sequence<I...>) {
      Rule::update(constants.as<typename Rule::template Constants<T>>(), v[kParam], v[kGrad], v[kFirstState + I]...);
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
    // adadelta: lr, rho, eps, weight_decay
    {{"adadelta", RuleId::adadelta, {0.5, 0.5, 1, 0}, 1}, {1, 2, 2, 3}, {0, 2, 3, 3.5}},
    {{"negative gradient", RuleId::adadelta, {0.5, 0.5, 1, 0}, 1}, {1, -2, 2, 3}, {2, -2, 3, 3.5}},
    {{"zero gradient", RuleId::adadelta, {0.5, 0.5, 1, 0}, 1}, {1, 0, 2, 3}, {1, 0, 1, 1.5}},
    {{"decay", RuleId::adadelta, {0.5, 0.5, 1, 0.5}, 1}, {2, 1, 2, 3}, {1, 1, 3, 3.5}},
    {{"NaN gradient", RuleId::adadelta, {0.5, 0.5, 1, 0}, 1}, {1, nan, 2, 3}, {nan, nan, nan, nan}},
    {{"NaN acc_delta", RuleId::adadelta, {0.5, 0.5, 1, 0}, 1}, {1, 2, 2, nan}, {nan, 2, 3, nan}},

    // adagrad: lr, lr_decay, eps, weight_decay, decoupled
    {{"adagrad", RuleId::adagrad, {0.5, 0, 0, 0, 0}, 1}, {1, 2, 12}, {0.75, 2, 16}},
    {{"eps", RuleId::adagrad, {0.5, 0, 4, 0, 0}, 1}, {1, 2, 12}, {0.875, 2, 16}},
    {{"rate decays", RuleId::adagrad, {1.5, 1, 0, 0, 0}, 3}, {1, 2, 12}, {0.75, 2, 16}},
    {{"coupled decay", RuleId::adagrad, {0.5, 0, 0, 0.5, 0}, 1}, {2, 1, 12}, {1.75, 1, 16}},
    {{"decoupled decay", RuleId::adagrad, {0.5, 0, 0, 0.5, 1}, 1}, {2, 2, 12}, {1.25, 2, 16}},
    {{"NaN gradient", RuleId::adagrad, {0.5, 0, 0, 0, 0}, 1}, {1, nan, 12}, {nan, nan, nan}},

    // adam: lr, beta1, beta2, eps, weight_decay, amsgrad, decoupled. After step 1 with g = 2, m = 1 and v = 1, their
    // bias corrected 2 and 4, and the change is lr * 2 / (2 + eps).
    {{"first step", RuleId::adam, {0.25, 0.5, 0.75, 2, 0, 0, 0}, 1}, {1, 2, 0, 0}, {0.875, 2, 1, 1}},
    {{"states are averages", RuleId::adam, {0.25, 0.5, 0.75, 6, 0, 0, 0}, 1}, {0, 4, 8, 28}, {-0.1875, 4, 6, 25}},
    {{"coupled decay", RuleId::adam, {0.25, 0.5, 0.75, 2, 0.5, 0, 0}, 1}, {2, 1, 0, 0}, {1.875, 1, 1, 1}},
    {{"decoupled decay", RuleId::adam, {0.25, 0.5, 0.75, 2, 0.5, 0, 1}, 1}, {2, 2, 0, 0}, {1.625, 2, 1, 1}},
    {{"decoupled without decay", RuleId::adam, {0.25, 0.5, 0.75, 2, 0, 0, 1}, 1}, {2, 2, 0, 0}, {1.875, 2, 1, 1}},
    {{"amsgrad, old maximum", RuleId::adam, {0.25, 0.5, 0.75, 4, 0, 1, 0}, 1}, {1, 2, 0, 0, 4}, {0.9375, 2, 1, 1, 4}},
    {{"amsgrad, new maximum", RuleId::adam, {0.25, 0.5, 0.75, 2, 0, 1, 0}, 1}, {1, 2, 0, 0, 0.5}, {0.875, 2, 1, 1, 1}},
    {{"zero gradient", RuleId::adam, {0.25, 0.5, 0.75, 2, 0, 0, 0}, 1}, {1, 0, 0, 0}, {1, 0, 0, 0}},
    {{"infinite v stops p", RuleId::adam, {0.25, 0.5, 0.75, 2, 0, 0, 0}, 1}, {1, 2, 0, infinity}, {1, 2, 1, infinity}},
    {{"NaN gradient", RuleId::adam, {0.25, 0.5, 0.75, 2, 0, 1, 0}, 1}, {1, nan, 0, 0, 4}, {nan, nan, nan, nan, nan}},
    {{"NaN parameter", RuleId::adam, {0.25, 0.5, 0.75, 2, 0, 0, 0}, 1}, {nan, 2, 0, 0}, {nan, 2, 1, 1}},
    {{"NaN exp_avg", RuleId::adam, {0.25, 0.5, 0.75, 2, 0, 0, 0}, 1}, {1, 2, nan, 0}, {nan, 2, nan, 1}},
    {{"NaN exp_avg_sq", RuleId::adam, {0.25, 0.5, 0.75, 2, 0, 1, 0}, 1}, {1, 2, 0, nan, 4}, {nan, 2, 1, nan, nan}},
    {{"NaN maximum", RuleId::adam, {0.25, 0.5, 0.75, 2, 0, 1, 0}, 1}, {1, 2, 0, 0, nan}, {nan, 2, 1, 1, nan}},

    // adamax: lr, beta1, beta2, eps, weight_decay
    {{"new maximum", RuleId::adamax, {0.25, 0.5, 0.5, 2, 0}, 1}, {1, 2, 0, 4}, {0.875, 2, 1, 4}},
    {{"old maximum", RuleId::adamax, {0.25, 0.5, 0.5, 2, 0}, 1}, {1, 2, 0, 16}, {0.9375, 2, 1, 8}},
    {{"negative gradient", RuleId::adamax, {0.25, 0.5, 0.5, 2, 0}, 1}, {1, -2, 0, 0}, {1.125, -2, -1, 4}},
    {{"decay", RuleId::adamax, {0.25, 0.5, 0.5, 2, 0.5}, 1}, {2, 1, 0, 0}, {1.875, 1, 1, 4}},
    {{"NaN gradient", RuleId::adamax, {0.25, 0.5, 0.5, 2, 0}, 1}, {1, nan, 0, 16}, {nan, nan, nan, nan}},
    {{"NaN exp_inf", RuleId::adamax, {0.25, 0.5, 0.5, 2, 0}, 1}, {1, 2, 0, nan}, {nan, 2, 1, nan}},

    // asgd: lr, lambd, alpha, t0, weight_decay; eta, mu
    {{"follows", RuleId::asgd, {0, 0.5, 0, 0, 0}, 1, {0.5, 1}}, {2, 1, 8}, {1, 1, 1}},
    {{"follows, from a NaN", RuleId::asgd, {0, 0.5, 0, 0, 0}, 1, {0.5, 1}}, {2, 1, nan}, {1, 1, 1}},
    {{"averages", RuleId::asgd, {0, 0.5, 0, 0, 0}, 1, {0.5, 0.5}}, {2, 1, 3}, {1, 1, 2}},
    {{"decay", RuleId::asgd, {0, 0.5, 0, 0, 0.5}, 1, {0.5, 0.5}}, {2, 1, 2.5}, {0.5, 1, 1.5}},
    {{"NaN gradient", RuleId::asgd, {0, 0.5, 0, 0, 0}, 1, {0.5, 0.5}}, {2, nan, 3}, {nan, nan, nan}},

    // lion: lr, beta1, beta2, weight_decay
    {{"sign is -1", RuleId::lion, {0.25, 0.5, 0.75, 0}, 1}, {1, -2, 1}, {1.25, -2, 0.25}},
    {{"sign is 1", RuleId::lion, {0.25, 0.5, 0.75, 0}, 1}, {1, 2, -1}, {0.75, 2, -0.25}},
    {{"sign is 0", RuleId::lion, {0.25, 0.5, 0.75, 0}, 1}, {1, -2, 2}, {1, -2, 1}},
    {{"sign is 0, with decay", RuleId::lion, {0.25, 0.5, 0.75, 0.5}, 1}, {2, -2, 2}, {1.75, -2, 1}},
    {{"nothing at all", RuleId::lion, {0.25, 0.5, 0.75, 0}, 1}, {1, 0, 0}, {1, 0, 0}},
    {{"decay", RuleId::lion, {0.25, 0.5, 0.75, 0.5}, 1}, {2, -2, 1}, {2, -2, 0.25}},
    {{"NaN gradient", RuleId::lion, {0.25, 0.5, 0.75, 0}, 1}, {1, nan, 1}, {nan, nan, nan}},
    {{"NaN parameter", RuleId::lion, {0.25, 0.5, 0.75, 0}, 1}, {nan, -2, 1}, {nan, -2, 0.25}},
    {{"NaN exp_avg", RuleId::lion, {0.25, 0.5, 0.75, 0}, 1}, {1, -2, nan}, {nan, -2, nan}},

    // muon: decay, adjusted_lr; the gradient is the orthogonalized update
    {{"muon", RuleId::muon, {0, 0.25}, 1}, {1, 2}, {0.5, 2}},
    {{"decay", RuleId::muon, {0.5, 0.25}, 1}, {2, 2}, {0.5, 2}},
    {{"no decay of an infinite parameter", RuleId::muon, {0, 0.25}, 1}, {infinity, 2}, {infinity, 2}},
    {{"NaN update", RuleId::muon, {0.5, 0.25}, 1}, {2, nan}, {nan, nan}},

    // muon_momentum: momentum, nesterov; the parameter is only written
    {{"momentum", RuleId::muon_momentum, {0.75, 0}, 1}, {nan, 4, 8}, {7, 4, 7}},
    {{"nesterov", RuleId::muon_momentum, {0.75, 1}, 1}, {nan, 4, 8}, {6.25, 4, 7}},
    {{"small momentum", RuleId::muon_momentum, {0.25, 0}, 1}, {nan, 4, 8}, {5, 4, 5}},
    {{"small momentum, nesterov", RuleId::muon_momentum, {0.25, 1}, 1}, {nan, 4, 8}, {4.25, 4, 5}},
    {{"NaN gradient", RuleId::muon_momentum, {0.75, 1}, 1}, {1, nan, 8}, {nan, nan, nan}},

    // nadam: lr, beta1, beta2, eps, weight_decay, momentum_decay, decoupled; mu_product
    {{"nadam", RuleId::nadam, {0.25, 0.5, 0.75, 2, 0, 0, 0}, 1, {0}}, {1, 2, 0, 0}, {0.890625, 2, 1, 1}},
    {{"coupled", RuleId::nadam, {0.25, 0.5, 0.75, 2, 0.5, 0, 0}, 1, {0}}, {2, 1, 0, 0}, {1.890625, 1, 1, 1}},
    {{"decoupled", RuleId::nadam, {0.25, 0.5, 0.75, 2, 0.5, 0, 1}, 1, {0}}, {2, 2, 0, 0}, {1.640625, 2, 1, 1}},
    {{"NaN gradient", RuleId::nadam, {0.25, 0.5, 0.75, 2, 0, 0, 0}, 1, {0}}, {1, nan, 0, 0}, {nan, nan, nan, nan}},

    // radam: lr, beta1, beta2, eps, weight_decay, decoupled. rho is 7 for beta2 = 0.75, and rho_1 is 1.
    {{"not yet adaptive", RuleId::radam, {0.25, 0.5, 0.75, 2, 0, 0}, 1}, {1, 2, 0, 0}, {0.5, 2, 1, 1}},
    {{"not yet, infinite v", RuleId::radam, {0.25, 0.5, 0.75, 2, 0, 0}, 1}, {1, 2, 0, infinity}, {0.5, 2, 1, infinity}},
    {{"coupled", RuleId::radam, {0.25, 0.5, 0.75, 2, 0.5, 0}, 1}, {2, 1, 0, 0}, {1.5, 1, 1, 1}},
    {{"decoupled", RuleId::radam, {0.25, 0.5, 0.75, 2, 0.5, 1}, 1}, {2, 2, 0, 0}, {1.25, 2, 1, 1}},
    {{"NaN gradient", RuleId::radam, {0.25, 0.5, 0.75, 2, 0, 0}, 1}, {1, nan, 0, 0}, {nan, nan, nan, nan}},

    // rmsprop: lr, alpha, eps, weight_decay, momentum, centered
    {{"rmsprop", RuleId::rmsprop, {0.5, 0.5, 0, 0, 0, 0}, 1}, {1, 2, 28}, {0.75, 2, 16}},
    {{"eps", RuleId::rmsprop, {0.5, 0.5, 4, 0, 0, 0}, 1}, {1, 2, 28}, {0.875, 2, 16}},
    {{"decay", RuleId::rmsprop, {0.5, 0.5, 0, 0.5, 0, 0}, 1}, {2, 1, 28}, {1.75, 1, 16}},
    {{"momentum", RuleId::rmsprop, {0.5, 0.5, 0, 0, 0.5, 0}, 1}, {1, 2, 28, 1}, {0.5, 2, 16, 1}},
    {{"centered", RuleId::rmsprop, {0.5, 0.5, 0, 0, 0, 1}, 1}, {1, 2, 36, 0, 6}, {0.5, 2, 20, 0, 4}},
    {{"variance below zero", RuleId::rmsprop, {0.5, 0.5, 2, 0, 0, 1}, 1}, {1, 2, 0, 0, 6}, {0.5, 2, 2, 0, 4}},
    {{"both", RuleId::rmsprop, {0.5, 0.5, 0, 0, 0.5, 1}, 1}, {1, 2, 36, 2, 6}, {0, 2, 20, 2, 4}},
    {{"NaN gradient", RuleId::rmsprop, {0.5, 0.5, 0, 0, 0.5, 1}, 1}, {1, nan, 36, 2, 6}, {nan, nan, nan, nan, nan}},
    {{"NaN square_avg", RuleId::rmsprop, {0.5, 0.5, 0, 0, 0, 1}, 1}, {1, 2, nan, 0, 6}, {nan, 2, nan, 0, 4}},

    // rprop: etas[0], etas[1], step_sizes[0], step_sizes[1]
    {{"same sign", RuleId::rprop, {0.5, 2, 0.125, 8}, 1}, {1, 3, 1, 1}, {-1, 3, 3, 2}},
    {{"same sign, negative", RuleId::rprop, {0.5, 2, 0.125, 8}, 1}, {1, -3, -1, 1}, {3, -3, -3, 2}},
    {{"opposite signs", RuleId::rprop, {0.5, 2, 0.125, 8}, 1}, {1, 3, -1, 1}, {1, 3, 0, 0.5}},
    {{"after a change of sign", RuleId::rprop, {0.5, 2, 0.125, 8}, 1}, {1, 3, 0, 1}, {0, 3, 3, 1}},
    {{"zero gradient", RuleId::rprop, {0.5, 2, 0.125, 8}, 1}, {1, 0, 3, 1}, {1, 0, 0, 1}},
    {{"largest step", RuleId::rprop, {0.5, 2, 0.125, 8}, 1}, {1, 3, 1, 5}, {-7, 3, 3, 8}},
    {{"smallest step", RuleId::rprop, {0.5, 2, 0.125, 8}, 1}, {1, 3, -1, 0.125}, {1, 3, 0, 0.125}},
    {{"tiny gradients agree", RuleId::rprop, {0.5, 2, 0.125, 8}, 1},
     {1, 0x1p-100, 0x1p-100, 1},
     {-1, 0x1p-100, 0x1p-100, 2}},
    {{"NaN gradient", RuleId::rprop, {0.5, 2, 0.125, 8}, 1}, {1, nan, 1, 1}, {1, nan, nan, 1}},

    // sgd: lr, momentum, dampening, weight_decay, nesterov
    {{"plain", RuleId::sgd, {0.5, 0, 0, 0, 0}, 1}, {1, 0.5}, {0.75, 0.5}},
    {{"weight decay", RuleId::sgd, {0.5, 0, 0, 0.25, 0}, 2}, {1, 0.5}, {0.625, 0.5}},
    {{"nesterov means nothing without momentum", RuleId::sgd, {0.5, 0, 0, 0, 1}, 2}, {1, 0.5}, {0.75, 0.5}},
    {{"first step: not dampened", RuleId::sgd, {0.5, 0.5, 0.5, 0, 0}, 1}, {1, 0.5, 8}, {0.75, 0.5, 0.5}},
    {{"momentum", RuleId::sgd, {0.5, 0.5, 0, 0, 0}, 2}, {1, 0.5, 1}, {0.5, 0.5, 1}},
    {{"dampening", RuleId::sgd, {0.5, 0.5, 0.5, 0, 0}, 2}, {1, 0.5, 1}, {0.625, 0.5, 0.75}},
    {{"nesterov", RuleId::sgd, {0.5, 0.5, 0, 0, 1}, 2}, {1, 0.5, 3}, {0.25, 0.5, 2}},
    {{"nesterov, first step", RuleId::sgd, {0.5, 0.5, 0, 0, 1}, 1}, {1, 0.5, 8}, {0.625, 0.5, 0.5}},
    {{"all of it", RuleId::sgd, {0.5, 0.5, 0.5, 0.25, 1}, 2}, {1, 0.5, 1}, {0.40625, 0.5, 0.875}},
    {{"the first step forgets a NaN", RuleId::sgd, {0.5, 0.5, 0, 0, 0}, 1}, {1, 0.5, nan}, {0.75, 0.5, 0.5}},
    {{"NaN gradient", RuleId::sgd, {0.5, 0.5, 0, 0, 0}, 2}, {1, nan, 1}, {nan, nan, nan}},
    {{"NaN parameter", RuleId::sgd, {0.5, 0.5, 0, 0, 0}, 2}, {nan, 0.5, 1}, {nan, 0.5, 1}},
    {{"NaN momentum", RuleId::sgd, {0.5, 0.5, 0, 0, 0}, 2}, {1, 0.5, nan}, {nan, 0.5, nan}},

    // sparse_adam: lr, beta1, beta2, eps. At step 1 the correction of m is 1/2, and of the root of v, too.
    {{"first step", RuleId::sparse_adam, {0.25, 0.5, 0.75, 1}, 1}, {1, 2, 0, 0}, {0.875, 2, 1, 1}},
    {{"averages", RuleId::sparse_adam, {0.25, 0.5, 0.75, 7}, 1}, {0, 4, 8, 28}, {-0.125, 4, 6, 25}},
    {{"zero gradient", RuleId::sparse_adam, {0.25, 0.5, 0.75, 1}, 1}, {1, 0, 2, 12}, {0.9375, 0, 1, 9}},
    {{"NaN gradient", RuleId::sparse_adam, {0.25, 0.5, 0.75, 1}, 1}, {1, nan, 0, 0}, {nan, nan, nan, nan}},
    {{"NaN exp_avg_sq", RuleId::sparse_adam, {0.25, 0.5, 0.75, 1}, 1}, {1, 2, 0, nan}, {nan, 2, 1, nan}},
};

TEST_CASE_TEMPLATE("by hand", T, float, double) {
  for (const Row& row : kByHand) {
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
using Formula = void (*)(const double* hyper, double t, double& p, double g, double* state, double* scalar);

void adadelta(const double* hyper, double /*t*/, double& p, double g, double* state, double* /*scalar*/) {
  const double lr = hyper[0], rho = hyper[1], eps = hyper[2], weight_decay = hyper[3];
  g += weight_decay * p;
  state[0] = rho * state[0] + (1 - rho) * g * g;
  const double delta = std::sqrt(state[1] + eps) / std::sqrt(state[0] + eps) * g;
  state[1] = rho * state[1] + (1 - rho) * delta * delta;
  p -= lr * delta;
}

void adagrad(const double* hyper, double t, double& p, double g, double* state, double* /*scalar*/) {
  const double lr = hyper[0] / (1 + (t - 1) * hyper[1]), eps = hyper[2], weight_decay = hyper[3];
  const bool decoupled = hyper[4] != 0;
  if (!decoupled) g += weight_decay * p;
  if (decoupled) p -= lr * weight_decay * p;
  state[0] += g * g;
  p -= lr * g / (std::sqrt(state[0]) + eps);
}

void adam(const double* hyper, double t, double& p, double g, double* state, double* /*scalar*/) {
  const double lr = hyper[0], beta1 = hyper[1], beta2 = hyper[2], eps = hyper[3], weight_decay = hyper[4];
  const bool amsgrad = hyper[5] != 0, decoupled = hyper[6] != 0;
  if (!decoupled) g += weight_decay * p;
  if (decoupled) p -= lr * weight_decay * p;
  state[0] = beta1 * state[0] + (1 - beta1) * g;
  state[1] = beta2 * state[1] + (1 - beta2) * g * g;
  state[2] = std::fmax(state[2], state[1]);
  const double second = amsgrad ? state[2] : state[1];
  p -= lr * (state[0] / (1 - std::pow(beta1, t))) / (std::sqrt(second / (1 - std::pow(beta2, t))) + eps);
}

void adamax(const double* hyper, double t, double& p, double g, double* state, double* /*scalar*/) {
  const double lr = hyper[0], beta1 = hyper[1], beta2 = hyper[2], eps = hyper[3], weight_decay = hyper[4];
  g += weight_decay * p;
  state[0] = beta1 * state[0] + (1 - beta1) * g;
  state[1] = std::fmax(beta2 * state[1], std::fabs(g) + eps);
  p -= lr / (1 - std::pow(beta1, t)) * state[0] / state[1];
}

void asgd(const double* hyper, double t, double& p, double g, double* state, double* scalar) {
  const double lr = hyper[0], lambd = hyper[1], alpha = hyper[2], t0 = hyper[3], weight_decay = hyper[4];
  const double eta = scalar[0], mu = scalar[1];
  g += weight_decay * p;
  p *= 1 - lambd * eta;
  p -= eta * g;
  state[0] += mu * (p - state[0]);
  scalar[0] = lr / std::pow(1 + lambd * lr * t, alpha);
  scalar[1] = 1 / std::fmax(1, t - t0);
}

void lion(const double* hyper, double /*t*/, double& p, double g, double* state, double* /*scalar*/) {
  const double lr = hyper[0], beta1 = hyper[1], beta2 = hyper[2], weight_decay = hyper[3];
  const double c = beta1 * state[0] + (1 - beta1) * g;
  p -= lr * ((c > 0) - (c < 0) + weight_decay * p);
  state[0] = beta2 * state[0] + (1 - beta2) * g;
}

void muon(const double* hyper, double /*t*/, double& p, double g, double* /*state*/, double* /*scalar*/) {
  p -= hyper[0] * p;
  p -= hyper[1] * g;
}

void muon_momentum(const double* hyper, double /*t*/, double& p, double g, double* state, double* /*scalar*/) {
  const double momentum = hyper[0];
  state[0] = momentum * state[0] + (1 - momentum) * g;
  p = hyper[1] != 0 ? (1 - momentum) * g + momentum * state[0] : state[0];
}

void nadam(const double* hyper, double t, double& p, double g, double* state, double* scalar) {
  const double lr = hyper[0], beta1 = hyper[1], beta2 = hyper[2], eps = hyper[3], weight_decay = hyper[4];
  const bool decoupled = hyper[6] != 0;
  const auto mu = [&](double step) { return beta1 * (1 - std::pow(0.96, step * hyper[5]) / 2); };
  if (!decoupled) g += weight_decay * p;
  if (decoupled) p -= lr * weight_decay * p;
  scalar[0] *= mu(t);
  state[0] = beta1 * state[0] + (1 - beta1) * g;
  state[1] = beta2 * state[1] + (1 - beta2) * g * g;
  const double nesterov = mu(t + 1) * state[0] / (1 - scalar[0] * mu(t + 1)) + (1 - mu(t)) * g / (1 - scalar[0]);
  p -= lr * nesterov / (std::sqrt(state[1] / (1 - std::pow(beta2, t))) + eps);
}

void radam(const double* hyper, double t, double& p, double g, double* state, double* /*scalar*/) {
  const double lr = hyper[0], beta1 = hyper[1], beta2 = hyper[2], eps = hyper[3], weight_decay = hyper[4];
  const bool decoupled = hyper[5] != 0;
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

void rmsprop(const double* hyper, double /*t*/, double& p, double g, double* state, double* /*scalar*/) {
  const double lr = hyper[0], alpha = hyper[1], eps = hyper[2], weight_decay = hyper[3], momentum = hyper[4];
  g += weight_decay * p;
  state[0] = alpha * state[0] + (1 - alpha) * g * g;
  state[2] = hyper[5] != 0 ? alpha * state[2] + (1 - alpha) * g : 0;
  state[1] = momentum * state[1] + g / (std::sqrt(state[0] - state[2] * state[2]) + eps);
  p -= lr * state[1];
}

void rprop(const double* hyper, double /*t*/, double& p, double g, double* state, double* /*scalar*/) {
  if (g * state[0] > 0) state[1] *= hyper[1];
  if (g * state[0] < 0) state[1] *= hyper[0];
  state[1] = std::fmin(std::fmax(state[1], hyper[2]), hyper[3]);
  if (g * state[0] < 0) g = 0;
  p -= ((g > 0) - (g < 0)) * state[1];
  state[0] = g;
}

void sgd(const double* hyper, double t, double& p, double g, double* state, double* /*scalar*/) {
  const double lr = hyper[0], momentum = hyper[1], dampening = hyper[2], weight_decay = hyper[3];
  g += weight_decay * p;
  if (momentum != 0) {
    state[0] = t == 1 ? g : momentum * state[0] + (1 - dampening) * g;
    g = hyper[4] != 0 ? g + momentum * state[0] : state[0];
  }
  p -= lr * g;
}

void sparse_adam(const double* hyper, double t, double& p, double g, double* state, double* /*scalar*/) {
  const double lr = hyper[0], beta1 = hyper[1], beta2 = hyper[2], eps = hyper[3];
  state[0] = beta1 * state[0] + (1 - beta1) * g;
  state[1] = beta2 * state[1] + (1 - beta2) * g * g;
  const double rate = lr * std::sqrt(1 - std::pow(beta2, t)) / (1 - std::pow(beta1, t));
  p -= rate * state[0] / (std::sqrt(state[1]) + eps);
}

Formula formula_of(RuleId rule) {
  switch (rule) {
#define ONEPASS_X(name, Type) \
  case RuleId::name:          \
    return name;
    ONEPASS_RULES(ONEPASS_X)
#undef ONEPASS_X
  }
  return nullptr;
}

TEST_CASE_TEMPLATE("a run of every setting follows the formulas", T, float, double) {
  // Rounding errors of 20 steps, with room to spare; what a wrong coefficient would do is far above it.
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
      info_of(setting.rule).advance(setting.hyper.data(), setting.step, setting.scalars.data());
      formula_of(setting.rule)(setting.hyper.data(), setting.step, p, g, state, scalars.data());
      CHECK(std::fabs(values[kParam] - p) <= tolerance * std::fabs(p));
      CHECK(setting.scalars == scalars);
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
    const char* name;
    Names hyper, states, scalars;
    bool counts_steps;
  } const table[] = {
      {RuleId::adadelta, "adadelta", {"lr", "rho", "eps", "weight_decay"}, {"square_avg", "acc_delta"}, {}, true},
      {RuleId::adagrad,
       "adagrad",
       {"lr", "lr_decay", "eps", "weight_decay", "decoupled_weight_decay?"},
       {"sum"},
       {},
       true},
      {RuleId::adam,
       "adam",
       {"lr", "betas[0]", "betas[1]", "eps", "weight_decay", "amsgrad", "decoupled_weight_decay"},
       {"exp_avg", "exp_avg_sq", "max_exp_avg_sq"},
       {},
       true},
      {RuleId::adamax,
       "adamax",
       {"lr", "betas[0]", "betas[1]", "eps", "weight_decay"},
       {"exp_avg", "exp_inf"},
       {},
       true},
      {RuleId::asgd, "asgd", {"lr", "lambd", "alpha", "t0", "weight_decay"}, {"ax"}, {"eta", "mu"}, true},
      {RuleId::lion, "lion", {"lr", "betas[0]", "betas[1]", "weight_decay"}, {"exp_avg"}, {}, false},
      {RuleId::muon, "muon", {"decay", "adjusted_lr"}, {}, {}, false},
      {RuleId::muon_momentum, "muon_momentum", {"momentum", "nesterov"}, {"momentum_buffer"}, {}, false},
      {RuleId::nadam,
       "nadam",
       {"lr", "betas[0]", "betas[1]", "eps", "weight_decay", "momentum_decay", "decoupled_weight_decay"},
       {"exp_avg", "exp_avg_sq"},
       {"mu_product"},
       true},
      {RuleId::radam,
       "radam",
       {"lr", "betas[0]", "betas[1]", "eps", "weight_decay", "decoupled_weight_decay"},
       {"exp_avg", "exp_avg_sq"},
       {},
       true},
      {RuleId::rmsprop,
       "rmsprop",
       {"lr", "alpha", "eps", "weight_decay", "momentum", "centered"},
       {"square_avg", "momentum_buffer", "grad_avg"},
       {},
       true},
      {RuleId::rprop,
       "rprop",
       {"etas[0]", "etas[1]", "step_sizes[0]", "step_sizes[1]"},
       {"prev", "step_size"},
       {},
       true},
      {RuleId::sgd, "sgd", {"lr", "momentum", "dampening", "weight_decay", "nesterov"}, {"momentum_buffer"}, {}, false},
      {RuleId::sparse_adam, "sparse_adam", {"lr", "betas[0]", "betas[1]", "eps"}, {"exp_avg", "exp_avg_sq"}, {}, true},
  };
  CHECK(std::size(table) == kRules);
  for (const auto& row : table) {
    const RuleInfo& info = info_of(row.rule);
    CHECK(std::string(info.name) == row.name);
    CHECK(find_rule(row.name) == row.rule);
    CHECK(Names(info.hyper_names.begin(), info.hyper_names.end()) == row.hyper);
    CHECK(Names(info.state_names.begin(), info.state_names.end()) == row.states);
    CHECK(Names(info.scalar_names.begin(), info.scalar_names.end()) == row.scalars);
    CHECK(info.counts_steps == row.counts_steps);
  }
  CHECK_THROWS_AS(find_rule("adamw"), std::invalid_argument);
  CHECK_THROWS_AS(find_rule("adafactor"), std::invalid_argument);
}

TEST_CASE("states in use") {
  struct {
    RuleId rule;
    std::array<double, kMaxHyper> hyper;
    unsigned states;
  } const table[] = {
      {RuleId::sgd, {0.1, 0.0, 0.0, 0.0, 0.0}, 0b0},
      {RuleId::sgd, {0.1, 0.9, 0.0, 0.0, 0.0}, 0b1},
      {RuleId::adam, {0.1, 0.9, 0.99, 0.0, 0.0, 0.0, 1.0}, 0b011},
      {RuleId::adam, {0.1, 0.9, 0.99, 0.0, 0.0, 1.0, 0.0}, 0b111},
      {RuleId::lion, {0.1, 0.0, 0.0, 0.0}, 0b1},
      {RuleId::rmsprop, {0.1, 0.9, 0.0, 0.0, 0.0, 0.0}, 0b001},
      {RuleId::rmsprop, {0.1, 0.9, 0.0, 0.0, 0.9, 0.0}, 0b011},
      {RuleId::rmsprop, {0.1, 0.9, 0.0, 0.0, 0.0, 1.0}, 0b101},
      {RuleId::rmsprop, {0.1, 0.9, 0.0, 0.0, 0.9, 1.0}, 0b111},
  };
  for (const auto& row : table) CHECK(info_of(row.rule).states_used(row.hyper.data()) == row.states);
}

TEST_CASE("gradients that a step takes") {
  struct {
    RuleId rule;
    std::array<double, kMaxHyper> hyper;
    bool sparse;
    bool dense = true;
  } const table[] = {
      {RuleId::sgd, {0.1, 0.0, 0.0, 0.0, 0.0}, true},
      {RuleId::sgd, {0.1, 0.9, 0.0, 0.0, 0.0}, false},
      {RuleId::sgd, {0.1, 0.0, 0.0, 0.1, 0.0}, false},
      {RuleId::adagrad, {0.1, 0.1, 0.0, 0.0, 0.0}, true},
      {RuleId::adagrad, {0.1, 0.1, 0.0, 0.1, 0.0}, false},
      {RuleId::adagrad, {0.1, 0.1, 0.0, 0.1, 1.0}, true},
      {RuleId::adam, {0.1, 0.9, 0.99, 0.0, 0.0, 0.0, 0.0}, false},
      {RuleId::adam, {0.1, 0.9, 0.99, 0.0, 0.1, 1.0, 1.0}, true},
      {RuleId::lion, {0.1, 0.9, 0.99, 0.1}, true},
      {RuleId::sparse_adam, {0.1, 0.9, 0.99, 1e-8}, true, false},
      {RuleId::adadelta, {}, false},
      {RuleId::adamax, {}, false},
      {RuleId::asgd, {}, false},
      {RuleId::nadam, {}, false},
      {RuleId::radam, {}, false},
      {RuleId::rmsprop, {}, false},
      {RuleId::rprop, {}, false},
  };
  for (const auto& row : table) {
    CAPTURE(std::string_view(info_of(row.rule).name));
    CHECK(info_of(row.rule).takes_sparse(row.hyper.data()) == row.sparse);
    CHECK(info_of(row.rule).takes_dense == row.dense);
  }
}

// -- adafactor, which has a driver of its own -------------------------------------------------------------------------

TEST_CASE("adafactor's constants") {
  const RuleInfo& info = adafactor_info();
  const std::vector<std::string> hyper(info.hyper_names.begin(), info.hyper_names.end());
  CHECK(hyper == std::vector<std::string>{"lr", "beta2_decay", "eps[0]?", "eps[1]", "d", "weight_decay"});
  CHECK(info.counts_steps);
  AdafactorConstants c;
  const double values[] = {0.25, -0.5, -1.0, 0.125, 2.0, 0.5};
  info.prepare(values, 4.0, nullptr, false, &c);
  CHECK(c.weight == 0.5);
  CHECK(c.rate == 0.25);
  CHECK(c.decay == 0.125);
  CHECK(c.eps1 == -1.0);
  info.prepare(values, 64.0, nullptr, true, &c);
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

// Constants are computed in double and rounded once, at the end: T(1.0 - 0.9) is not T(1) - T(0.9).
TEST_CASE_TEMPLATE("prepare", T, float, double) {
  struct {
    Setting setting;
    Values before;
    std::size_t operand;
    T want;
  } const table[] = {
      {{"lr", RuleId::sgd, {0.1, 0, 0, 0, 0}, 2}, {0, 1}, kParam, -T(0.1)},
      {{"momentum", RuleId::sgd, {0, 0.9, 0, 0, 0}, 2}, {0, 0, 1}, kFirstState, T(0.9)},
      {{"dampening", RuleId::sgd, {0, 0.9, 0.3, 0, 0}, 2}, {0, 1, 0}, kFirstState, T(1.0 - 0.3)},
      {{"weight_decay", RuleId::sgd, {1, 0, 0, 0.7, 0}, 2}, {1, 0}, kParam, T(1) - T(0.7)},
      {{"beta1", RuleId::adam, {0, 0.9, 0, 1, 0, 0, 0}, 1}, {0, 1, 0, 0}, kFirstState, T(1.0 - 0.9)},
      {{"beta2", RuleId::adam, {0, 0.9, 0.99, 1, 0, 0, 0}, 1}, {0, 1, 0, 0}, kFirstState + 1, T(1.0 - 0.99)},
      {{"small beta", RuleId::adam, {0, 0.3, 0, 1, 0, 0, 0}, 1}, {0, 0, 1, 0}, kFirstState, T(0.3)},
      {{"lr, bias correction, eps", RuleId::adam, {0.1, 0, 0.99, 0.3, 0, 0, 0}, 3},
       {0, 1, 0, 1},
       kParam,
       -(T(0.1 * std::sqrt(1.0 - std::pow(0.99, 3))) / (T(1) + T(0.3 * std::sqrt(1.0 - std::pow(0.99, 3)))))},
      {{"lr * weight_decay", RuleId::adam, {0.1, 0, 0, 1, 0.7, 0, 1}, 1}, {1, 0, 0, 0}, kParam, T(1) - T(0.1 * 0.7)},
      {{"lr", RuleId::lion, {0.1, 0.9, 0.99, 0}, 1}, {0, 1, 0}, kParam, -T(0.1)},
      {{"beta2", RuleId::lion, {0.1, 0.9, 0.99, 0}, 1}, {0, 1, 0}, kFirstState, T(1.0 - 0.99)},
      {{"lr * weight_decay", RuleId::lion, {0.1, 0, 0, 0.7}, 1}, {1, 0, 0}, kParam, T(1) - T(0.1 * 0.7)},
  };
  for (const auto& [setting, before, operand, want] : table) {
    CAPTURE(setting.what);
    CHECK(update<T>(setting, before)[operand] == static_cast<double>(want));
  }
}

}  // namespace
}  // namespace onepass::testing
