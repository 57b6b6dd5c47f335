// The two-loop recursion on inner products, against the matrix of its definition.
#include "cpu/two_loop.h"

#include <doctest/doctest.h>

#include <cmath>
#include <functional>
#include <numeric>
#include <vector>

#include "reference.h"

namespace onepass::testing {
namespace {

using Vector = std::vector<long double>;
using Matrix = std::vector<Vector>;

constexpr std::size_t kSize = 12;
constexpr std::size_t kEnds[] = {5, 5, 12};  // of groups, one of them empty

long double dot(const Vector& a, const Vector& b) { return std::inner_product(a.begin(), a.end(), b.begin(), 0.0L); }

Vector product(const Matrix& m, const Vector& v) {
  Vector result;
  for (const Vector& row : m) result.push_back(dot(row, v));
  return result;
}

std::size_t group_of(std::size_t i) {
  return static_cast<std::size_t>(std::ranges::upper_bound(kEnds, i) - std::begin(kEnds));
}

Vector random_vector(std::uint64_t seed) {
  Vector v(kSize);
  for (std::size_t i = 0; i < kSize; ++i) v[i] = number(seed * 1000 + i);
  return v;
}

// Pairs of a quadratic function, so that their curvature is positive.
struct Pairs {
  std::vector<Vector> s, y;
  explicit Pairs(std::size_t count) {
    for (std::size_t k = 0; k < count; ++k) {
      s.push_back(random_vector(k));
      Vector change;
      for (std::size_t i = 0; i < kSize; ++i) change.push_back(s[k][i] * static_cast<long double>(i + 1));
      const long double sum = std::accumulate(s[k].begin(), s[k].end(), 0.0L);
      for (long double& x : change) x += sum / 4;
      y.push_back(change);
    }
  }
};

// Returns the result of a pass of Products for these pairs, the last of which is the new one.
Found found_for(const Pairs& pairs, std::size_t first, std::size_t past, const Vector& gradient) {
  Found found{.width = (past - first) * Products::sums, .sums = {}, .largest = std::vector<double>(3)};
  for (std::size_t group = 0; group < 3; ++group) {
    const auto partial = [&](const Vector& a, const Vector& b) {
      long double sum = 0;
      for (std::size_t i = 0; i < kSize; ++i)
        if (group_of(i) == group) sum += a[i] * b[i];
      return static_cast<double>(sum);
    };
    for (std::size_t k = first; k < past; ++k) {
      found.sums.push_back(partial(pairs.s[k], pairs.y[past - 1]));
      found.sums.push_back(partial(pairs.y[k], pairs.y[past - 1]));
      found.sums.push_back(partial(pairs.s[k], gradient));
      found.sums.push_back(partial(pairs.y[k], gradient));
    }
  }
  return found;
}

// Returns -H g, with H built as in the textbook: H = (I - rho s y') H (I - rho y s') + rho s s', beginning with gamma
// D.
Vector expected(const Pairs& pairs, std::size_t first, std::size_t past, Vector g, const std::vector<double>& weights) {
  const auto masked = [&](Vector v) {
    for (std::size_t i = 0; i < kSize; ++i)
      if (weights[group_of(i)] == 0) v[i] = 0;
    return v;
  };
  g = masked(g);
  Matrix h(kSize, Vector(kSize));
  long double gamma = 1;
  for (std::size_t k = first; k < past; ++k) {
    const Vector s = masked(pairs.s[k]);
    const Vector y = masked(pairs.y[k]);
    if (dot(s, y) <= 0) continue;
    long double y_d_y = 0;
    for (std::size_t i = 0; i < kSize; ++i) y_d_y += y[i] * y[i] * static_cast<long double>(weights[group_of(i)]);
    gamma = dot(s, y) / y_d_y;
  }
  for (std::size_t i = 0; i < kSize; ++i) h[i][i] = gamma * static_cast<long double>(weights[group_of(i)]);
  for (std::size_t k = first; k < past; ++k) {
    const Vector s = masked(pairs.s[k]);
    const Vector y = masked(pairs.y[k]);
    if (dot(s, y) <= 0) continue;
    const long double rho = 1 / dot(s, y);
    const Vector h_y = product(h, y);
    const long double y_h_y = dot(y, h_y);
    for (std::size_t i = 0; i < kSize; ++i)
      for (std::size_t j = 0; j < kSize; ++j)
        h[i][j] += -rho * (s[i] * h_y[j] + h_y[i] * s[j]) + (rho * rho * y_h_y + rho) * s[i] * s[j];
  }
  Vector d = product(h, g);
  for (long double& x : d) x = -x;
  return d;
}

Vector combined(const History::Direction& direction, const Pairs& pairs, std::size_t first, const Vector& g) {
  Vector d(kSize);
  for (std::size_t i = 0; i < kSize; ++i) {
    const Combine::Factors& own = direction.factors[group_of(i)];
    d[i] = own.of_gradient * g[i];
    for (std::size_t k = 0; k < own.of_s.size(); ++k)
      d[i] += own.of_s[k] * pairs.s[first + k][i] + own.of_y[k] * pairs.y[first + k][i];
  }
  return d;
}

void check(const Vector& got, const Vector& want) {
  long double size = 0;
  for (const long double x : want) size = std::max(size, std::fabs(x));
  for (std::size_t i = 0; i < kSize; ++i) CHECK(std::fabs(got[i] - want[i]) <= 1e-12L * size);
}

const std::vector<double> kWeights[] = {{1, 1, 1}, {1, 0.5, 0.25}, {0.125, 0, 1}, {1, 1, 0}, {0, 0, 1}};

TEST_CASE("the direction is that of the matrix, with a history that grows and slides") {
  constexpr std::size_t most = 4;
  const Pairs pairs(9);
  for (const std::vector<double>& weights : kWeights) {
    History history;
    std::size_t first = 0;
    for (std::size_t past = 1; past <= pairs.s.size(); ++past) {
      const Vector g = random_vector(100 + past);
      const Found found = found_for(pairs, first, past, g);
      history.push(found);
      const std::size_t before = first;
      if (history.size() > most) {
        history.drop_oldest();
        ++first;
      }
      CHECK(history.size() == past - first);
      const History::Direction direction = history.direction(found, first - before, weights);
      CHECK(direction.alpha.size() == history.size());
      const Vector d = combined(direction, pairs, first, g);
      check(d, expected(pairs, first, past, g, weights));
      for (std::size_t i = 0; i < kSize; ++i)
        if (weights[group_of(i)] == 0) CHECK(d[i] == 0);
    }
  }
}

TEST_CASE("a new gradient with an old history: the last pair of the pass was not taken") {
  const Pairs pairs(4);
  History history;
  for (std::size_t past = 1; past <= 3; ++past) history.push(found_for(pairs, 0, past, pairs.y[0]));
  const Vector g = random_vector(7);
  const Found found = found_for(pairs, 0, 4, g);
  check(combined(history.direction(found, 0, kWeights[1]), pairs, 0, g), expected(pairs, 0, 3, g, kWeights[1]));
}

TEST_CASE("a pair that has no positive curvature in the groups that count is skipped") {
  Pairs pairs(3);
  for (std::size_t i = 5; i < kSize; ++i) pairs.y[1][i] = -pairs.s[1][i];  // positive in the first group only
  History history;
  const Vector g = random_vector(7);
  Found found;
  for (std::size_t past = 1; past <= 3; ++past) history.push(found = found_for(pairs, 0, past, g));
  const std::vector<double> weights = {0, 1, 1};
  const History::Direction direction = history.direction(found, 0, weights);
  CHECK(direction.alpha[1] == 0);
  check(combined(direction, pairs, 0, g), expected(pairs, 0, 3, g, weights));
}

TEST_CASE("without a history: the negative gradient, times the weights") {
  const std::vector<double> weights = {1, 0.5, 0};
  const History::Direction direction = History().direction({}, 0, weights);
  for (std::size_t group = 0; group < 3; ++group) {
    CHECK(direction.factors[group].of_gradient == -weights[group]);
    CHECK(direction.factors[group].of_s.empty());
  }
}

}  // namespace
}  // namespace onepass::testing
