// All parameters of an optimizer as one flat vector, and the passes over such vectors, for L-BFGS and for norms.
//
// An iteration of L-BFGS reads the history of pairs (s, y) twice: once for all inner products that the two-loop
// recursion needs (cpu/two_loop.h), and once for the direction, which is a linear combination of the history and the
// gradient. Every pass computes its sums in double and in a fixed order, so no bit depends on threads or instruction
// sets.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "job.h"

namespace onepass {

// A tensor's place in the vector. Its elements are consecutive there, in the order of its shape, last index fastest.
struct Part {
  static constexpr std::size_t kFlat = 0;    // operand of the layout: the vector
  static constexpr std::size_t kTensor = 1;  // operand of the layout: the tensor

  std::int64_t begin = 0;  // in the vector
  std::int64_t length = 0;
  Operand tensor;                  // no data: zeros
  const Layout* layout = nullptr;  // null: the tensor's memory has the vector's order
};

// A range of the vector that one thread works on. It is in one parameter group.
struct Chunk {
  std::int64_t begin, end;
  std::size_t group;
};

// The division of the vector into groups, the arithmetic type and the threads.
struct Flat {
  std::vector<std::int64_t> ends;  // of the parameter groups, which are consecutive
  bool wide = false;               // arithmetic in float64 rather than float32
  int threads = 1;

  std::int64_t length() const { return ends.empty() ? 0 : ends.back(); }

  // Returns the size of this many vectors in the arithmetic type.
  std::int64_t bytes(std::int64_t vectors) const { return vectors * length() * (wide ? 8 : 4); }
};

// A step that was taken, s = x' - x, and the change of the gradient, y = g' - g. Both are flat vectors: packed
// operands.
struct Pair {
  Operand s, y;
};

// -- the passes ------------------------------------------------------------------------------------------------------

// out = the tensors. This is exact: the format of `out` can represent all of theirs. Sum: out . direction, or 0 without
// a direction. Largest: |out|, NaN if an element is NaN.
struct Gather {
  static constexpr std::size_t sums = 1;
  std::span<const Part> parts;
  Operand out;
  Operand direction;  // may have no data

  std::int64_t vectors() const { return 3; }
};

// Sum: |tensors - from|^2, or |tensors|^2 without `from`. All in double, in which float32 values cannot overflow.
struct Distance {
  static constexpr std::size_t sums = 1;
  std::span<const Part> parts;
  Operand from;  // may have no data

  std::int64_t vectors() const { return 2; }
};

// tensors = x + step * direction, or x to the bit if the step is 0. With `keep`, x is first overwritten with the
// tensors. In x each tensor has its own format, and begins where it would begin in x's format, which must not be a
// smaller one.
struct Move {
  static constexpr std::size_t sums = 0;
  std::span<const Part> parts;
  Operand x, direction;
  double step = 0.0;
  bool keep = false;

  std::int64_t vectors() const { return 4; }
};

// Sums: the products of each pair with the last pair's y and with the gradient. If there is a previous gradient, the
// last pair is written first: s = step * direction, y = gradient - previous.
struct Products {
  enum Sum : std::size_t { sy, yy, sg, yg, sums };  // of each pair
  std::span<const Pair> pairs;
  Operand gradient, previous, direction;
  double step = 0.0;

  std::int64_t vectors() const { return 3 + 2 * static_cast<std::int64_t>(pairs.size()); }
};

// out = of_gradient * gradient + the sum of of_s[k] * s[k] + of_y[k] * y[k], with factors of each group.
// Sums: out . gradient, and the sum of |out|. Largest: |out|.
struct Combine {
  static constexpr std::size_t sums = 2;
  struct Factors {
    double of_gradient = 0.0;
    std::vector<double> of_s, of_y;
  };
  std::span<const Pair> pairs;
  std::span<const Factors> factors;  // of each group
  Operand gradient, out;

  std::int64_t vectors() const { return 2 + 2 * static_cast<std::int64_t>(pairs.size()); }
};

// The result of a pass: sums and the largest magnitude of each group.
struct Found {
  std::size_t width = 0;  // sums of a group
  std::vector<double> sums;
  std::vector<double> largest;

  double sum(std::size_t group, std::size_t k) const { return sums[group * width + k]; }
};

// Run one pass, in at most one parallel region.
Found run(const Flat& flat, const Gather& pass);
Found run(const Flat& flat, const Distance& pass);
Found run(const Flat& flat, const Move& pass);
Found run(const Flat& flat, const Products& pass);
Found run(const Flat& flat, const Combine& pass);

// A kernel: runs a pass over one chunk, adds to `sums` and updates `largest`.
template <class Pass>
using PassKernel = void (*)(const Pass& pass, const Chunk& chunk, double* sums, double& largest);

struct PassKernels {
  PassKernel<Gather> gather;
  PassKernel<Distance> distance;
  PassKernel<Move> move;
  PassKernel<Products> products;
  PassKernel<Combine> combine;
};

}  // namespace onepass
