// The two-loop recursion of L-BFGS (Nocedal 1980; Nocedal and Wright 2006, algorithm 7.4) without its vectors: it works
// on the coefficients of a linear combination, and needs only the inner products of the vectors (Chen et al. 2014,
// "Large-scale L-BFGS using MapReduce").
//
// A parameter group may have a weight D: its learning rate divided by the largest one. The first approximation of the
// inverse Hessian is then gamma D instead of gamma I, where gamma = s.y / y.Dy of the newest pair. A group of weight 0
// is left out. So products are kept for each group.
#pragma once

#include <span>
#include <vector>

#include "cpu/flat.h"

namespace onepass {

// The products of all pairs, oldest first: each y with itself, with the older y and with the older s.
class History {
 public:
  std::size_t size() const { return rows_.size(); }

  // Adds a pair. `found` is the result of a pass of Products whose last pair is the new one.
  void push(const Found& found);
  void drop_oldest();

  struct Direction {
    std::vector<Combine::Factors> factors;  // of each group
    std::vector<double> alpha;              // of each pair, computed by the recursion's first loop
  };

  // Returns -H g. `found` has the products of the pairs with the gradient; its pair `first` is the oldest pair here.
  Direction direction(const Found& found, std::size_t first, std::span<const double> weights) const;

 private:
  struct Row {
    Found found;           // the result of its pass
    std::size_t skip = 0;  // pairs at its beginning that were dropped later
  };

  double product(std::size_t row, std::size_t pair, Products::Sum which, std::span<const double> weights) const;

  std::vector<Row> rows_;
};

// Returns the sum over all groups of one of a pair's products, weighted by these weights.
double weighted(const Found& found, std::size_t pair, Products::Sum which, std::span<const double> weights);

}  // namespace onepass
