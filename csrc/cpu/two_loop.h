// The two-loop recursion of L-BFGS (Nocedal 1980; Nocedal and Wright 2006, algorithm 7.4) without its vectors: on the
// coefficients of a linear combination, which takes nothing of the vectors but their inner products (Chen et al. 2014,
// "Large-scale L-BFGS using MapReduce").
//
// A parameter group may have a weight D, its learning rate in relation to the largest: the first approximation of the
// inverse Hessian is then gamma D in place of gamma I, gamma = s.y / y.Dy of the newest pair, and a group of weight 0
// is left out altogether. So products are kept for each group.
#pragma once

#include <span>
#include <vector>

#include "cpu/flat.h"

namespace onepass {

// The products of the pairs among each other, oldest first: each y with itself, the older y and the older s.
class History {
 public:
  std::size_t size() const { return rows_.size(); }

  // Adds a pair, by what a pass of Products with it as the last pair has found.
  void push(const Found& found);
  void drop_oldest();

  struct Direction {
    std::vector<Combine::Factors> factors;  // of each group
    std::vector<double> alpha;              // of each pair, as the recursion's first loop finds them
  };

  // -H g. `found` holds the products of the pairs with the gradient; pair `first` there is the oldest one here.
  Direction direction(const Found& found, std::size_t first, std::span<const double> weights) const;

 private:
  struct Row {
    Found found;           // what its pass has found
    std::size_t skip = 0;  // pairs at its beginning that have been dropped since
  };

  double product(std::size_t row, std::size_t pair, Products::Sum which, std::span<const double> weights) const;

  std::vector<Row> rows_;
};

// The sum over all groups of one of the products of a pair, as it counts with these weights.
double weighted(const Found& found, std::size_t pair, Products::Sum which, std::span<const double> weights);

}  // namespace onepass
