#include "cpu/two_loop.h"

#include <utility>

namespace onepass {

double weighted(const Found& found, std::size_t pair, Products::Sum which, std::span<const double> weights) {
  double total = 0.0;
  for (std::size_t group = 0; group < weights.size(); ++group) {
    const bool meets_weight = which == Products::yy || which == Products::yg;
    if (weights[group] != 0.0)
      total += (meets_weight ? weights[group] : 1.0) * found.sum(group, pair * Products::sums + which);
  }
  return total;
}

double History::product(std::size_t row, std::size_t pair, Products::Sum which, std::span<const double> weights) const {
  return weighted(rows_[row].found, pair + rows_[row].skip, which, weights);
}

void History::push(const Found& found) { rows_.push_back({found}); }

void History::drop_oldest() {
  rows_.erase(rows_.begin());
  for (Row& row : rows_) ++row.skip;
}

History::Direction History::direction(const Found& found, std::size_t first, std::span<const double> weights) const {
  const std::size_t n = size();
  // If groups now have weight 0, a pair may have lost its positive curvature. Such a pair is skipped.
  std::vector<double> curvature(n);
  double gamma = 1.0;
  for (std::size_t i = 0; i < n; ++i) {
    curvature[i] = product(i, i, Products::sy, weights);
    if (curvature[i] > 0.0) gamma = curvature[i] / product(i, i, Products::yy, weights);
  }

  // q = -g - sum of alpha_i y_i, from the newest pair to the oldest: alpha_i = s_i.q / s_i.y_i
  std::vector<double> alpha(n);
  for (std::size_t i = n; i-- > 0;) {
    if (!(curvature[i] > 0.0)) continue;
    double s_q = -weighted(found, first + i, Products::sg, weights);
    for (std::size_t j = i + 1; j < n; ++j) s_q -= alpha[j] * product(j, i, Products::sy, weights);
    alpha[i] = s_q / curvature[i];
  }

  // r = gamma D q + sum of (alpha_i - beta_i) s_i, from the oldest pair to the newest: beta_i = y_i.r / s_i.y_i
  std::vector<double> of_s(n);
  for (std::size_t i = 0; i < n; ++i) {
    if (!(curvature[i] > 0.0)) continue;
    double y_q = -weighted(found, first + i, Products::yg, weights);
    for (std::size_t j = 0; j < n; ++j) y_q -= alpha[j] * product(i > j ? i : j, i > j ? j : i, Products::yy, weights);
    double y_r = gamma * y_q;
    for (std::size_t j = 0; j < i; ++j) y_r += of_s[j] * product(i, j, Products::sy, weights);
    of_s[i] = alpha[i] - y_r / curvature[i];
  }

  Direction direction{{}, alpha};
  for (const double weight : weights) {
    Combine::Factors factors{-gamma * weight, std::vector<double>(n), std::vector<double>(n)};
    if (weight != 0.0) {
      factors.of_s = of_s;
      for (std::size_t i = 0; i < n; ++i) factors.of_y[i] = -gamma * weight * alpha[i];
    }
    direction.factors.push_back(std::move(factors));
  }
  return direction;
}

}  // namespace onepass
