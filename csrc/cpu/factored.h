// The second driver: the steps of Adafactor and CAME, whose second moments are means over the rows and the columns of a
// matrix.
//
// A tensor is a batch of slices of `rows` x `columns` elements. It is divided into blocks by its shape and the order
// of its dimensions in memory. A step goes over them in phases, and each phase may run on any number of threads:
//
//   measure             one pass over the gradient (in Adafactor also the parameter): sums of squares of every block,
//                       by row and by column
//   combine             the sums of all blocks, in order, into the new row and column variances
//   norm                one pass over the gradient: the sum of squares of the update
//   average             of CAME only, one pass over gradient and momentum: the new momentum, and sums of squares of its
//                       distance from the update (the residual), by row and by column
//   combine_residuals   the same as `combine`, for these sums
//   apply               one pass over gradient (CAME: momentum) and parameter
//
// A tile holds many small slices. For them, `measure` includes combine and norm, `apply` includes `average` and
// `combine_residuals`, and the lanes of the vectors are slices. A vector of n elements is n slices of one element, and
// has no residuals.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "job.h"
#include "rules/adafactor.h"
#include "rules/came.h"

namespace onepass {

// The operands beside kParam and kGrad.
inline constexpr std::size_t kRowVar = kFirstState;         // of a vector: its variance
inline constexpr std::size_t kColumnVar = kFirstState + 1;  // a vector has none
inline constexpr std::size_t kMomentum = kFirstState + 2;   // this and the following are CAME's
inline constexpr std::size_t kResidualRowVar = kFirstState + 3;
inline constexpr std::size_t kResidualColumnVar = kFirstState + 4;
inline constexpr std::size_t kFactoredOperands = kFirstState + 5;

struct FactoredJob {
  std::int64_t slices = 1, rows = 1, columns = 1;
  const Layout* batch = nullptr;  // of the slices; null: one slice, or packed slices of one element
  std::array<Operand, kFactoredOperands> operands;
  // In elements, within a slice; zero where an operand has one value for a whole row or column.
  std::array<std::int64_t, kFactoredOperands> row_strides{}, column_strides{};
  bool is_came = false;  // rather than Adafactor
  AdafactorConstants adafactor;
  CameConstants came;
  double grad_factor = 1.0;  // factor of gradients: 1 / loss scale, negative to maximize
  bool wide = false;         // arithmetic in float64 rather than float32

  std::int64_t length() const { return slices * rows * columns; }
};

// Memory for the sums of a step. It is kept for the next step, because fresh pages would cost more than the sums.
class FactoredRoom {
 public:
  void* take(std::size_t bytes);  // valid until `clear` or `rewind`
  void clear();                   // merges several blocks into one; may allocate
  void rewind() { used_ = 0; }    // never allocates

 private:
  std::vector<std::unique_ptr<std::byte[]>> blocks_;
  std::size_t size_ = 0;  // of the last block
  std::size_t used_ = 0;
  std::size_t total_ = 0;
};

// Steps every job, with up to `threads` threads. Bits do not depend on the number of threads. An empty tensor and its
// variances are not changed.
void run_factored(std::span<const FactoredJob> jobs, int threads, FactoredRoom& room);

// -- between run_factored and the kernels ----------------------------------------------------------------------------

// A block of large slices has kBlockLines lines of kBlockWidth places: long runs of memory, and a sum for each place
// fits the L1 cache. A block of small slices is one tile. `combine` works on a tile of an axis at once.
inline constexpr std::int64_t kBlockLines = 64;
inline constexpr std::int64_t kBlockWidth = 4096;
inline constexpr std::int64_t kFactoredTile = 1024;

constexpr std::int64_t blocks_in(std::int64_t length, std::int64_t size) { return (length + size - 1) / size; }

// One axis of large slices. T is the arithmetic type.
struct FactoredAxis {
  std::int64_t length = 0;
  std::array<std::int64_t, kFactoredOperands> strides{};
  std::size_t variance = 0;  // the operand with a value for each place on the axis
  bool is_rows = false;
  std::int64_t parts = 0;  // number of sums for each place: one for each range of the other axis
  void* sums = nullptr;    // T[slices][parts][length]; `combine` writes the roots of the variances to the first part
};

// The axes of large slices, and the means of squares along them. A block has kBlockLines along the first and
// kBlockWidth along the second.
struct Factors {
  FactoredAxis lines, places;
  double* row_totals = nullptr;  // [slices][tiles of rows]: sums of the row variances; after the phase, the first tile
                                 // has that of the slice
};

struct FactoredWork {
  const FactoredJob* job = nullptr;
  std::int64_t lanes = 0;            // small slices in a block; zero: slices are large
  std::int64_t blocks = 0;           // of all slices
  std::int64_t combinations = 0;     // tasks of the phase `combine`
  Factors squares;                   // of gradients
  Factors residuals;                 // CAME's
  double* param_squares = nullptr;   // a sum for each block
  double* update_squares = nullptr;  // a sum for each block
  double clipping = 1.0;             // of the update, in CAME
  double step_size = 0.0;
};

// Runs a phase over blocks, or combinations, [begin, end).
using FactoredKernel = void (*)(const FactoredWork& work, std::int64_t begin, std::int64_t end);

struct FactoredKernels {
  FactoredKernel measure, combine, norm, average, combine_residuals, apply;
};

}  // namespace onepass
