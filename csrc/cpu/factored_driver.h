// The phases of cpu/factored.h over blocks, in tiles that stay in the L1 cache.
#pragma once

#include <cstdint>

#include "cpu/convert.h"
#include "cpu/factored.h"
#include "cpu/runs.h"
#include "cpu/sums.h"
#include "rules/adafactor.h"
#include "rules/came.h"
#include "target.h"

namespace onepass::inline ONEPASS_TARGET {

static_assert(kFactoredTile == kSumTile);

// A running average of mean squares.
template <class T>
class MeanSquares {
 public:
  explicit MeanSquares(const AdafactorConstants& c)
      : interpolates_(true), average_(1.0 - c.weight, c.weight), sum_(0.0), gain_(0), added_(0) {}

  MeanSquares(double weight, double added)
      : interpolates_(false), average_(0.0), sum_(1.0 - weight), gain_(T(weight)), added_(T(added)) {}

  // An interpolation makes NaN of an infinite average, as in torch's Adafactor.
  T operator()(T old, T mean) const { return interpolates_ ? average_(old, mean) : sum_(old, gain_ * (mean + added_)); }

 private:
  bool interpolates_;
  Average<T> average_;
  RunningSum<T> sum_;
  T gain_, added_;
};

// The constants of a step in the arithmetic type.
template <class T>
struct FactoredConstants {
  explicit FactoredConstants(const FactoredWork& work) : FactoredConstants(work, *work.job) {}

  MeanSquares<T> squares, residuals;
  Average<T> momentum;
  T factor, least_mean, limit, decay, step_size, clipping;
  Flag<T> decays;

 private:
  FactoredConstants(const FactoredWork& work, const FactoredJob& job)
      : squares(job.is_came ? MeanSquares<T>(job.came.square_weight, job.came.eps1) : MeanSquares<T>(job.adafactor)),
        residuals(job.is_came ? MeanSquares<T>(job.came.residual_weight, job.came.eps2) : squares),
        momentum(job.is_came ? 1.0 - job.came.momentum_weight : 0.0, job.is_came ? job.came.momentum_weight : 1.0),
        factor(T(job.grad_factor)),
        least_mean(T(job.is_came ? 0.0 : job.adafactor.eps1)),
        limit(T(1.0 / (job.is_came ? 0.0 : job.adafactor.eps1))),  // infinite in CAME
        decay(T(job.is_came ? job.came.decay : job.adafactor.decay)),
        step_size(T(work.step_size)),
        clipping(T(work.clipping)),
        decays(job.is_came ? job.came.decay != 0.0 : job.adafactor.decay != 0.0) {}
};

ONEPASS_INLINE std::int64_t least(std::int64_t a, std::int64_t b) { return a < b ? a : b; }

// Returns the offset of a slice's first element.
inline std::int64_t slice_offset(const FactoredJob& job, std::size_t operand, std::int64_t slice) {
  std::int64_t first = 0;
  for_each_run(nullptr, job.batch, operand, slice, 1,
               [&](std::int64_t offset, std::int64_t, std::int64_t) { first = offset; });
  return first;
}

// -- large slices ----------------------------------------------------------------------------------------------------

// The position of a block in its slice.
struct Block {
  Block(const FactoredWork& work, std::int64_t index) {
    const FactoredAxis& lines = work.squares.lines;  // the residuals have the same axes
    const FactoredAxis& places = work.squares.places;
    const std::int64_t across = blocks_in(places.length, kBlockWidth);
    const std::int64_t down = blocks_in(lines.length, kBlockLines);
    tile = index % across;
    strip = index / across % down;
    slice = index / across / down;
    line = strip * kBlockLines;
    place = tile * kBlockWidth;
    height = least(kBlockLines, lines.length - line);
    width = least(kBlockWidth, places.length - place);
  }

  std::int64_t slice, strip, tile;
  std::int64_t line, place, height, width;
};

template <class T>
T* sums_of(const FactoredAxis& axis, std::int64_t slice, std::int64_t patch) {
  return static_cast<T*>(axis.sums) + (slice * axis.parts + patch) * axis.length;
}

template <class T>
T* roots_of(const FactoredAxis& axis, std::int64_t slice) {
  return sums_of<T>(axis, slice, 0);
}

// A part of a block that fits a tile: some whole lines, or a run of one line.
struct Patch {
  std::int64_t line, place, height, width;  // line and place relative to the block's
  std::int64_t elements() const { return height * width; }
};

template <class Visit>
ONEPASS_INLINE void for_patches(const Block& block, Visit&& visit) {
  const std::int64_t width = least(block.width, kFactoredTile);
  const std::int64_t height = kFactoredTile / width;
  for (std::int64_t line = 0; line < block.height; line += height)
    for (std::int64_t place = 0; place < block.width; place += width)
      visit(Patch{line, place, least(height, block.height - line), least(width, block.width - place)});
}

// One operand of a block, patch by patch, as a packed array: in place, or decoded into a tile.
template <class T>
class Elements {
 public:
  Elements(const FactoredWork& work, std::size_t operand, const Block& block)
      : operand_(work.job->operands[operand]),
        line_stride_(work.squares.lines.strides[operand]),
        place_stride_(work.squares.places.strides[operand]),
        first_(slice_offset(*work.job, operand, block.slice) + block.line * line_stride_ +
               block.place * place_stride_) {
    const bool packed = place_stride_ == 1 && (line_stride_ == block.width || block.width >= kFactoredTile);
    in_place_ = packed && operand_.format == native_format<T>() &&
                reinterpret_cast<std::uintptr_t>(operand_.data) % sizeof(T) == 0;
  }

  // Changes to the elements are stored if `write` is called.
  T* read(const Patch& patch) {
    if (in_place_) return reinterpret_cast<T*>(element(operand_, offset_of(patch, 0)));
    for (std::int64_t i = 0; i < patch.height; ++i)
      read_run(operand_, offset_of(patch, i), place_stride_, tile_ + i * patch.width, patch.width);
    return tile_;
  }

  void write(const Patch& patch) {
    if (in_place_) return;
    for (std::int64_t i = 0; i < patch.height; ++i)
      write_run(operand_, offset_of(patch, i), place_stride_, tile_ + i * patch.width, patch.width);
  }

 private:
  std::int64_t offset_of(const Patch& patch, std::int64_t line) const {
    return first_ + (patch.line + line) * line_stride_ + patch.place * place_stride_;
  }

  Operand operand_;
  std::int64_t line_stride_, place_stride_, first_;
  bool in_place_;
  alignas(64) T tile_[kFactoredTile];
};

// The sums of squares of a block, by line and by place.
template <class T>
class BlockSums {
 public:
  BlockSums(const Factors& factors, const Block& block)
      : lines_(sums_of<T>(factors.lines, block.slice, block.tile) + block.line),
        places_(sums_of<T>(factors.places, block.slice, block.strip) + block.place) {
    for (std::int64_t i = 0; i < block.height; ++i) lines_[i] = T(0);
    for (std::int64_t j = 0; j < block.width; ++j) places_[j] = T(0);
  }

  void add(const Patch& patch, const T* values, T factor) const {
    T* const sums = places_ + patch.place;
    for (std::int64_t i = 0; i < patch.height; ++i, values += patch.width) {
      const auto square = [&](std::int64_t j) { return (factor * values[j]) * (factor * values[j]); };
      lines_[patch.line + i] += T(sum_of<T>(patch.width, square));
#pragma GCC ivdep
      for (std::int64_t j = 0; j < patch.width; ++j) sums[j] += square(j);
    }
  }

 private:
  T* lines_;
  T* places_;
};

template <class T>
void measure_block(const FactoredWork& work, std::int64_t index) {
  const FactoredConstants<T> c(work);
  const Block block(work, index);
  const BlockSums<T> sums(work.squares, block);
  double squares = 0.0;
  Elements<T> grad(work, kGrad, block);
  Elements<T> param(work, kParam, block);
  for_patches(block, [&](const Patch& patch) {
    sums.add(patch, grad.read(patch), c.factor);
    if (work.job->is_came) return;  // it does not need the parameter's squares
    const T* p = param.read(patch);
    squares += sum_of<T>(patch.elements(), [&](std::int64_t j) { return p[j] * p[j]; });
  });
  work.param_squares[index] = squares;
}

// Computes the new variances of at most a tile of places on an axis, and their roots. Returns the sum of the variances.
template <class T>
double combine_places(const FactoredJob& job, const MeanSquares<T>& average, const FactoredAxis& axis,
                      std::int64_t slice, std::int64_t first, std::int64_t n, std::int64_t averaged) {
  double totals[kFactoredTile] = {};
  for (std::int64_t patch = 0; patch < axis.parts; ++patch) {
    const T* sums = sums_of<T>(axis, slice, patch) + first;
    for (std::int64_t k = 0; k < n; ++k) totals[k] += static_cast<double>(sums[k]);
  }
  const double share = 1.0 / static_cast<double>(averaged);
  const Operand& operand = job.operands[axis.variance];
  const std::int64_t stride = axis.strides[axis.variance];
  const std::int64_t offset = slice_offset(job, axis.variance, slice) + first * stride;
  T variance[kFactoredTile];
  read_run(operand, offset, stride, variance, n);
  for (std::int64_t k = 0; k < n; ++k) variance[k] = average(variance[k], T(totals[k] * share));
  write_run(operand, offset, stride, variance, n);
  // The step uses the variances as they are stored.
  read_run(operand, offset, stride, variance, n);
  T* const roots = roots_of<T>(axis, slice) + first;
  for (std::int64_t k = 0; k < n; ++k) roots[k] = Adafactor::inverse_root(variance[k]);
  return sum_of<T>(n, [&](std::int64_t k) { return variance[k]; });
}

// A combination is a tile of one axis: first the tiles of the lines, then those of the places.
template <class T>
void combine_one(const FactoredWork& work, const Factors& factors, const MeanSquares<T>& average, std::int64_t index) {
  const std::int64_t of_lines = blocks_in(factors.lines.length, kFactoredTile);
  const std::int64_t of_places = blocks_in(factors.places.length, kFactoredTile);
  const std::int64_t slice = index / (of_lines + of_places);
  const std::int64_t at = index % (of_lines + of_places);
  const bool in_lines = at < of_lines;
  const FactoredAxis& axis = in_lines ? factors.lines : factors.places;
  const FactoredAxis& other = in_lines ? factors.places : factors.lines;
  const std::int64_t tile = in_lines ? at : at - of_lines;
  const std::int64_t first = tile * kFactoredTile;
  const double total = combine_places<T>(*work.job, average, axis, slice, first,
                                         least(kFactoredTile, axis.length - first), other.length);
  if (axis.is_rows) factors.row_totals[slice * blocks_in(axis.length, kFactoredTile) + tile] = total;
}

// Returns the factor of the lines' roots.
template <class T>
T scale_of(const FactoredWork& work, const Factors& factors, T least_mean, std::int64_t slice) {
  const double total = factors.row_totals[slice * blocks_in(work.job->rows, kFactoredTile)];
  return T(Adafactor::row_scale(total / static_cast<double>(work.job->rows), double{least_mean}));
}

// Divides some lines of packed arrays by the roots of their second moments.
template <class T>
void divide_lines(const T* values, T factor, const T* line_roots, T scale, const T* place_roots, T limit,
                  const Patch& patch, T* divided) {
  for (std::int64_t i = 0; i < patch.height; ++i, values += patch.width, divided += patch.width) {
    const T root = line_roots[i] * scale;
#pragma GCC ivdep
    for (std::int64_t j = 0; j < patch.width; ++j)
      divided[j] = Adafactor::update(factor * values[j], root * place_roots[j], limit);
  }
}

// Calls visit(patch, values) for all patches of a block, with an operand divided by the roots of its second moments.
template <class T, class Visit>
ONEPASS_INLINE void for_divided(const FactoredWork& work, const Block& block, std::size_t operand, T factor,
                                const Factors& factors, const FactoredConstants<T>& c, Visit&& visit) {
  const T* const line_roots = roots_of<T>(factors.lines, block.slice) + block.line;
  const T* const place_roots = roots_of<T>(factors.places, block.slice) + block.place;
  const T scale = scale_of<T>(work, factors, c.least_mean, block.slice);
  Elements<T> values(work, operand, block);
  alignas(64) T divided[kFactoredTile];
  for_patches(block, [&](const Patch& patch) {
    divide_lines(values.read(patch), factor, line_roots + patch.line, scale, place_roots + patch.place, c.limit, patch,
                 divided);
    visit(patch, divided);
  });
}

// Calls visit(patch, u) for all patches of a block.
template <class T, class Visit>
ONEPASS_INLINE void for_updates(const FactoredWork& work, const Block& block, const FactoredConstants<T>& c,
                                Visit&& visit) {
  for_divided(work, block, kGrad, c.factor, work.squares, c, visit);
}

template <class T>
void norm_block(const FactoredWork& work, std::int64_t index) {
  const Block block(work, index);
  double squares = 0.0;
  for_updates(work, block, FactoredConstants<T>(work), [&](const Patch& patch, const T* u) {
    squares += sum_of<T>(patch.elements(), [&](std::int64_t j) { return u[j] * u[j]; });
  });
  work.update_squares[index] = squares;
}

// Replaces the momentum of some elements.
template <class T>
ONEPASS_INLINE void advance_momentum(const FactoredConstants<T>& c, T* m, const T* u, std::int64_t n) {
#pragma GCC ivdep
  for (std::int64_t j = 0; j < n; ++j) m[j] = c.momentum(m[j], c.clipping * u[j]);
}

// Computes the clipped update's distance from the momentum, the residual.
template <class T>
ONEPASS_INLINE void distance_from_momentum(const FactoredConstants<T>& c, const T* u, const T* m, T* residual,
                                           std::int64_t n) {
  for (std::int64_t j = 0; j < n; ++j) residual[j] = c.clipping * u[j] - m[j];
}

template <class T>
void average_block(const FactoredWork& work, std::int64_t index) {
  const FactoredConstants<T> c(work);
  const Block block(work, index);
  const BlockSums<T> sums(work.residuals, block);
  Elements<T> momentum(work, kMomentum, block);
  alignas(64) T residual[kFactoredTile];
  for_updates(work, block, c, [&](const Patch& patch, const T* u) {
    advance_momentum(c, momentum.read(patch), u, patch.elements());
    momentum.write(patch);
    // The step uses the momentum as it is stored.
    const T* const m = momentum.read(patch);
    distance_from_momentum(c, u, m, residual, patch.elements());
    sums.add(patch, residual, T(1));
  });
}

template <class T>
ONEPASS_INLINE void apply_update(const FactoredConstants<T>& c, T* p, const T* u, std::int64_t n) {
#pragma GCC ivdep
  for (std::int64_t j = 0; j < n; ++j) p[j] = Adafactor::apply(p[j], u[j], c.step_size, c.decays, c.decay);
}

template <class T>
void apply_block(const FactoredWork& work, std::int64_t index) {
  const FactoredConstants<T> c(work);
  const Block block(work, index);
  Elements<T> param(work, kParam, block);
  const auto visit = [&](const Patch& patch, const T* u) {
    apply_update(c, param.read(patch), u, patch.elements());
    param.write(patch);
  };
  if (work.job->is_came) {
    for_divided(work, block, kMomentum, T(1), work.residuals, c, visit);
  } else {
    for_updates(work, block, c, visit);
  }
}

// -- small slices ----------------------------------------------------------------------------------------------------

// A block of small slices. Its arrays are [rows][columns][slices], so that the inner loops run over slices.
template <class T>
class Lanes {
 public:
  Lanes(const FactoredWork& work, std::int64_t index)
      : c_(work), job_(*work.job), first_(index * work.lanes), count_(least(work.lanes, job_.slices - first_)) {
    grad_ = read_all(kGrad, tile_);
  }

  std::int64_t elements() const { return job_.rows * job_.columns * count_; }

  // Returns the elements of all slices: in place, or decoded into the tile.
  T* read_all(std::size_t operand, T* tile) const {
    if (in_place(operand)) return reinterpret_cast<T*>(element(job_.operands[operand], first_));
    T* const elements = tile;
    for (std::int64_t i = 0; i < job_.rows; ++i)
      for (std::int64_t j = 0; j < job_.columns; ++j, tile += count_) read(operand, i, j, tile);
    return elements;
  }
  void write_all(std::size_t operand, const T* tile) const {
    if (in_place(operand)) return;
    for (std::int64_t i = 0; i < job_.rows; ++i)
      for (std::int64_t j = 0; j < job_.columns; ++j, tile += count_) write(operand, i, j, tile);
  }

  // Computes all new variances: of the gradient, and of the residual in CAME.
  void combine_squares() const { combine(grad_, c_.factor, kRowVar, kColumnVar, c_.squares); }
  void combine_residuals(const T* residual) const {
    combine(residual, T(1), kResidualRowVar, kResidualColumnVar, c_.residuals);
  }

  // Divide by the roots of the second moments, with the variances as they are stored.
  void update(T* update) const { divide(grad_, c_.factor, kRowVar, kColumnVar, update); }
  void divide_momentum(const T* m, T* divided) const { divide(m, T(1), kResidualRowVar, kResidualColumnVar, divided); }

  const FactoredConstants<T>& constants() const { return c_; }
  bool is_vector() const { return job_.operands[kColumnVar].data == nullptr; }

 private:
  void combine(const T* values, T factor, std::size_t row_var, std::size_t column_var,
               const MeanSquares<T>& average) const {
    combine_axis(values, factor, row_var, average, job_.rows, job_.columns, job_.columns, 1);
    if (!is_vector()) combine_axis(values, factor, column_var, average, job_.columns, 1, job_.rows, job_.columns);
  }

  void divide(const T* values, T factor, std::size_t row_var, std::size_t column_var, T* divided) const {
    T row_roots[kFactoredTile];
    T column_roots[kFactoredTile];
    T scale[kFactoredTile];
    for (std::int64_t s = 0; s < count_; ++s) scale[s] = column_roots[s] = is_vector() ? T(1) : T(0);
    for (std::int64_t i = 0; i < job_.rows; ++i) {
      T* row = row_roots + i * count_;
      read(row_var, i, 0, row);
      if (!is_vector())
        for (std::int64_t s = 0; s < count_; ++s) scale[s] += row[s];
      for (std::int64_t s = 0; s < count_; ++s) row[s] = Adafactor::inverse_root(row[s]);
    }
    if (!is_vector()) {
      for (std::int64_t s = 0; s < count_; ++s) scale[s] = Adafactor::row_scale(scale[s] / T(job_.rows), c_.least_mean);
      for (std::int64_t j = 0; j < job_.columns; ++j) {
        T* column = column_roots + j * count_;
        read(column_var, 0, j, column);
        for (std::int64_t s = 0; s < count_; ++s) column[s] = Adafactor::inverse_root(column[s]);
      }
    }
    for (std::int64_t i = 0; i < job_.rows; ++i)
      for (std::int64_t j = 0; j < job_.columns; ++j, values += count_, divided += count_) {
        const T* row = row_roots + i * count_;
        const T* column = column_roots + j * count_;
#pragma GCC ivdep
        for (std::int64_t s = 0; s < count_; ++s)
          divided[s] = Adafactor::update(factor * values[s], row[s] * scale[s] * column[s], c_.limit);
      }
  }

  bool in_place(std::size_t operand) const {
    const Operand& at = job_.operands[operand];
    return job_.batch == nullptr && job_.rows * job_.columns == 1 && at.format == native_format<T>() &&
           reinterpret_cast<std::uintptr_t>(at.data) % sizeof(T) == 0;
  }

  std::int64_t within(std::size_t operand, std::int64_t row, std::int64_t column) const {
    return row * job_.row_strides[operand] + column * job_.column_strides[operand];
  }

  // Read and write one element of each slice.
  void read(std::size_t operand, std::int64_t row, std::int64_t column, T* lanes) const {
    for_each_run(nullptr, job_.batch, operand, first_, count_,
                 [&](std::int64_t offset, std::int64_t stride, std::int64_t n) {
                   read_run(job_.operands[operand], offset + within(operand, row, column), stride, lanes, n);
                   lanes += n;
                 });
  }
  void write(std::size_t operand, std::int64_t row, std::int64_t column, const T* lanes) const {
    for_each_run(nullptr, job_.batch, operand, first_, count_,
                 [&](std::int64_t offset, std::int64_t stride, std::int64_t n) {
                   write_run(job_.operands[operand], offset + within(operand, row, column), stride, lanes, n);
                   lanes += n;
                 });
  }

  // Computes the new variances of `length` rows (or columns) of `averaged` elements each. In the array of values, rows
  // are `pitch` apart, and elements of a row `step` apart.
  void combine_axis(const T* values, T factor, std::size_t variance, const MeanSquares<T>& average, std::int64_t length,
                    std::int64_t pitch, std::int64_t averaged, std::int64_t step) const {
    T sums[kFactoredTile];
    T stored[kFactoredTile];
    for (std::int64_t k = 0; k < length; ++k) {
      for (std::int64_t s = 0; s < count_; ++s) sums[s] = T(0);
      for (std::int64_t m = 0; m < averaged; ++m) {
        const T* row = values + (k * pitch + m * step) * count_;
        for (std::int64_t s = 0; s < count_; ++s) sums[s] += (factor * row[s]) * (factor * row[s]);
      }
      read(variance, k, k, stored);  // its stride along the other axis is zero
      for (std::int64_t s = 0; s < count_; ++s) stored[s] = average(stored[s], sums[s] / T(averaged));
      write(variance, k, k, stored);
    }
  }

  const FactoredConstants<T> c_;
  const FactoredJob& job_;
  std::int64_t first_, count_;
  const T* grad_;
  alignas(64) T tile_[kFactoredTile];
};

template <class T>
void measure_lanes(const FactoredWork& work, std::int64_t index) {
  const Lanes<T> lanes(work, index);
  T tile[kFactoredTile];
  if (!work.job->is_came) {
    const T* param = lanes.read_all(kParam, tile);
    work.param_squares[index] = sum_of<T>(lanes.elements(), [&](std::int64_t k) { return param[k] * param[k]; });
  }
  lanes.combine_squares();
  lanes.update(tile);
  work.update_squares[index] = sum_of<T>(lanes.elements(), [&](std::int64_t k) { return tile[k] * tile[k]; });
}

template <class T>
void apply_lanes(const FactoredWork& work, std::int64_t index) {
  const Lanes<T> lanes(work, index);
  const FactoredConstants<T>& c = lanes.constants();
  T update[kFactoredTile];
  T tile[kFactoredTile];
  lanes.update(update);
  if (work.job->is_came) {
    T* m = lanes.read_all(kMomentum, tile);
    advance_momentum(c, m, update, lanes.elements());
    lanes.write_all(kMomentum, m);
    m = lanes.read_all(kMomentum, tile);  // as it is stored
    if (lanes.is_vector()) {
      for (std::int64_t k = 0; k < lanes.elements(); ++k) update[k] = m[k];
    } else {
      distance_from_momentum(c, update, m, update, lanes.elements());
      lanes.combine_residuals(update);
      lanes.divide_momentum(m, update);
    }
  }
  T* const param = lanes.read_all(kParam, tile);
  apply_update(c, param, update, lanes.elements());
  lanes.write_all(kParam, param);
}

// -- the phases ------------------------------------------------------------------------------------------------------

template <class T>
constexpr FactoredKernels factored_kernels() {
  return {
      .measure =
          [](const FactoredWork& work, std::int64_t begin, std::int64_t end) {
            for (std::int64_t b = begin; b < end; ++b)
              work.lanes > 0 ? measure_lanes<T>(work, b) : measure_block<T>(work, b);
          },
      .combine =
          [](const FactoredWork& work, std::int64_t begin, std::int64_t end) {
            const FactoredConstants<T> c(work);
            for (std::int64_t k = begin; k < end; ++k) combine_one<T>(work, work.squares, c.squares, k);
          },
      .norm =
          [](const FactoredWork& work, std::int64_t begin, std::int64_t end) {
            for (std::int64_t b = begin; b < end; ++b) norm_block<T>(work, b);
          },
      .average =
          [](const FactoredWork& work, std::int64_t begin, std::int64_t end) {
            for (std::int64_t b = begin; b < end; ++b) average_block<T>(work, b);
          },
      .combine_residuals =
          [](const FactoredWork& work, std::int64_t begin, std::int64_t end) {
            const FactoredConstants<T> c(work);
            for (std::int64_t k = begin; k < end; ++k) combine_one<T>(work, work.residuals, c.residuals, k);
          },
      .apply =
          [](const FactoredWork& work, std::int64_t begin, std::int64_t end) {
            for (std::int64_t b = begin; b < end; ++b)
              work.lanes > 0 ? apply_lanes<T>(work, b) : apply_block<T>(work, b);
          },
  };
}

}  // namespace onepass::inline ONEPASS_TARGET
