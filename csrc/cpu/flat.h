// All parameters of an optimizer as one vector, and what L-BFGS and the log of a run's steps compute on such vectors:
// the driver of their reductions.
//
// An iteration of L-BFGS passes twice over the history of pairs (s, y), once for all inner products that the two-loop
// recursion needs (cpu/two_loop.h), once for the direction, which is a linear combination of the history and the
// gradient. Every pass takes its sums on the way, each in double and in one order, so no bit depends on threads or
// instruction sets.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "job.h"

namespace onepass {

// A tensor's place in the vector. Its elements follow each other there in the order of its shape, last index fastest.
struct Part {
  static constexpr std::size_t kFlat = 0;    // in the layout: the vector,
  static constexpr std::size_t kTensor = 1;  // and the tensor

  std::int64_t begin = 0;  // in the vector
  std::int64_t length = 0;
  Operand tensor;                  // no data: zeros
  const Layout* layout = nullptr;  // null: the tensor's memory has the vector's order
};

// A range of the vector that one thread works on. It lies in one parameter group.
struct Chunk {
  std::int64_t begin, end;
  std::size_t group;
};

// How the vector is divided, and worked on.
struct Flat {
  std::vector<std::int64_t> ends;  // of the parameter groups, which follow each other
  bool wide = false;               // arithmetic in float64 rather than float32
  int threads = 1;

  std::int64_t length() const { return ends.empty() ? 0 : ends.back(); }

  // What so many vectors take in the arithmetic type.
  std::int64_t bytes(std::int64_t vectors) const { return vectors * length() * (wide ? 8 : 4); }
};

// A step that was taken, s = x' - x, and the change of the gradient, y = g' - g. Both are flat vectors: operands whose
// elements follow each other.
struct Pair {
  Operand s, y;
};

// -- the passes ------------------------------------------------------------------------------------------------------

// out = the tensors, which is exact: out has a format that holds all of theirs. Sums: out . direction, or 0 without
// one. Largest: |out|, NaN if any is.
struct Gather {
  static constexpr std::size_t sums = 1;
  std::span<const Part> parts;
  Operand out;
  Operand direction;  // may have no data

  std::int64_t vectors() const { return 3; }
};

// Sums: |tensors - from|^2, or |tensors|^2 if there is no `from`. All in double: 32-bit numbers cannot overflow.
struct Distance {
  static constexpr std::size_t sums = 1;
  std::span<const Part> parts;
  Operand from;  // may have no data

  std::int64_t vectors() const { return 2; }
};

// The tensors = x + step * direction, or x itself, to the bit, if the step is 0. `keep` first saves the tensors as x.
// In x each tensor has its own format, from the place on where it would begin in x's; which must not be a smaller one.
struct Move {
  static constexpr std::size_t sums = 0;
  std::span<const Part> parts;
  Operand x, direction;
  double step = 0.0;
  bool keep = false;

  std::int64_t vectors() const { return 4; }
};

// The products of each pair with the last pair's y and with the gradient. If there is a previous gradient, the last
// pair is written first: s = step * direction, y = gradient - previous.
struct Products {
  enum Sum : std::size_t { sy, yy, sg, yg, sums };  // of each pair
  std::span<const Pair> pairs;
  Operand gradient, previous, direction;
  double step = 0.0;

  std::int64_t vectors() const { return 3 + 2 * static_cast<std::int64_t>(pairs.size()); }
};

// out = of_gradient * gradient + the pairs, each times its factors, which every group has of its own.
// Sums: out . gradient, and of |out|. Largest: |out|.
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

// What a pass has found in each group.
struct Found {
  std::size_t width = 0;  // sums of a group
  std::vector<double> sums;
  std::vector<double> largest;

  double sum(std::size_t group, std::size_t k) const { return sums[group * width + k]; }
};

// Each runs one pass, in at most one parallel region.
Found run(const Flat& flat, const Gather& pass);
Found run(const Flat& flat, const Distance& pass);
Found run(const Flat& flat, const Move& pass);
Found run(const Flat& flat, const Products& pass);
Found run(const Flat& flat, const Combine& pass);

// The pass over one chunk, which adds to `sums` and raises `largest`: a kernel.
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
