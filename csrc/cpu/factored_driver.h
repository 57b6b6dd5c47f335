// The phases of cpu/factored.h over blocks, in tiles that stay in the L1 cache.
#pragma once

#include <cstdint>

#include "cpu/convert.h"
#include "cpu/factored.h"
#include "cpu/runs.h"
#include "cpu/sums.h"
#include "rules/adafactor.h"
#include "target.h"

namespace onepass::inline ONEPASS_TARGET {

static_assert(kFactoredTile == kSumTile);

// The constants of a step in the arithmetic type.
template <class T>
struct FactoredConstants {
  explicit FactoredConstants(const FactoredWork& work)
      : average(1.0 - work.job->constants.weight, work.job->constants.weight),
        factor(T(work.job->grad_factor)),
        eps1(T(work.job->constants.eps1)),
        limit(T(1.0 / work.job->constants.eps1)),
        decay(T(work.job->constants.decay)),
        step_size(T(work.step_size)),
        decays(work.job->constants.decay != 0.0) {}

  Average<T> average;
  T factor, eps1, limit, decay, step_size;
  Flag<T> decays;
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
    const std::int64_t across = blocks_in(work.places.length, kBlockWidth);
    const std::int64_t down = blocks_in(work.lines.length, kBlockLines);
    tile = index % across;
    strip = index / across % down;
    slice = index / across / down;
    line = strip * kBlockLines;
    place = tile * kBlockWidth;
    height = least(kBlockLines, work.lines.length - line);
    width = least(kBlockWidth, work.places.length - place);
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
        line_stride_(work.lines.strides[operand]),
        place_stride_(work.places.strides[operand]),
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

template <class T>
void measure_block(const FactoredWork& work, std::int64_t index) {
  const FactoredConstants<T> c(work);
  const Block block(work, index);
  T* const line_sums = sums_of<T>(work.lines, block.slice, block.tile) + block.line;
  T* const place_sums = sums_of<T>(work.places, block.slice, block.strip) + block.place;
  for (std::int64_t i = 0; i < block.height; ++i) line_sums[i] = T(0);
  for (std::int64_t j = 0; j < block.width; ++j) place_sums[j] = T(0);
  double squares = 0.0;
  Elements<T> grad(work, kGrad, block);
  Elements<T> param(work, kParam, block);
  for_patches(block, [&](const Patch& patch) {
    const T* g = grad.read(patch);
    T* const sums = place_sums + patch.place;
    for (std::int64_t i = 0; i < patch.height; ++i, g += patch.width) {
      const auto square = [&](std::int64_t j) { return (c.factor * g[j]) * (c.factor * g[j]); };
      line_sums[patch.line + i] += T(sum_of<T>(patch.width, square));
#pragma GCC ivdep
      for (std::int64_t j = 0; j < patch.width; ++j) sums[j] += square(j);
    }
    const T* p = param.read(patch);
    squares += sum_of<T>(patch.elements(), [&](std::int64_t j) { return p[j] * p[j]; });
  });
  work.param_squares[index] = squares;
}

// Computes the new variances of at most a tile of places on an axis, and their roots. Returns the sum of the variances.
template <class T>
double combine_places(const FactoredWork& work, const FactoredAxis& axis, std::int64_t slice, std::int64_t first,
                      std::int64_t n, std::int64_t averaged) {
  const FactoredConstants<T> c(work);
  double totals[kFactoredTile] = {};
  for (std::int64_t patch = 0; patch < axis.parts; ++patch) {
    const T* sums = sums_of<T>(axis, slice, patch) + first;
    for (std::int64_t k = 0; k < n; ++k) totals[k] += static_cast<double>(sums[k]);
  }
  const double share = 1.0 / static_cast<double>(averaged);
  const Operand& operand = work.job->operands[axis.variance];
  const std::int64_t offset = slice_offset(*work.job, axis.variance, slice) + first * axis.variance_stride;
  T variance[kFactoredTile];
  read_run(operand, offset, axis.variance_stride, variance, n);
  for (std::int64_t k = 0; k < n; ++k) variance[k] = c.average(variance[k], T(totals[k] * share));
  write_run(operand, offset, axis.variance_stride, variance, n);
  // The step uses the variances as they are stored.
  read_run(operand, offset, axis.variance_stride, variance, n);
  T* const roots = roots_of<T>(axis, slice) + first;
  for (std::int64_t k = 0; k < n; ++k) roots[k] = Adafactor::inverse_root(variance[k]);
  return sum_of<T>(n, [&](std::int64_t k) { return variance[k]; });
}

// A combination is a tile of one axis: first the tiles of the lines, then those of the places.
template <class T>
void combine_one(const FactoredWork& work, std::int64_t index) {
  const std::int64_t of_lines = blocks_in(work.lines.length, kFactoredTile);
  const std::int64_t of_places = blocks_in(work.places.length, kFactoredTile);
  const std::int64_t slice = index / (of_lines + of_places);
  const std::int64_t at = index % (of_lines + of_places);
  const bool in_lines = at < of_lines;
  const FactoredAxis& axis = in_lines ? work.lines : work.places;
  const FactoredAxis& other = in_lines ? work.places : work.lines;
  const std::int64_t tile = in_lines ? at : at - of_lines;
  const std::int64_t first = tile * kFactoredTile;
  const double total =
      combine_places<T>(work, axis, slice, first, least(kFactoredTile, axis.length - first), other.length);
  if (axis.variance == kRowVar) work.row_totals[slice * blocks_in(axis.length, kFactoredTile) + tile] = total;
}

// Returns the factor of the lines' roots.
template <class T>
T scale_of(const FactoredWork& work, std::int64_t slice) {
  const std::int64_t tiles = blocks_in(work.job->rows, kFactoredTile);
  double total = 0.0;
  for (std::int64_t tile = 0; tile < tiles; ++tile) total += work.row_totals[slice * tiles + tile];
  return T(Adafactor::row_scale(total / static_cast<double>(work.job->rows), work.job->constants.eps1));
}

// Computes the update of some lines, of packed arrays.
template <class T>
void update_lines(const FactoredConstants<T>& c, const T* grad, const T* line_roots, T scale, const T* place_roots,
                  const Patch& patch, T* update) {
  for (std::int64_t i = 0; i < patch.height; ++i, grad += patch.width, update += patch.width) {
    const T root = line_roots[i] * scale;
#pragma GCC ivdep
    for (std::int64_t j = 0; j < patch.width; ++j)
      update[j] = Adafactor::update(c.factor * grad[j], root * place_roots[j], c.limit);
  }
}

// Calls visit(patch, update) for all patches of a block.
template <class T, class Visit>
ONEPASS_INLINE void for_updates(const FactoredWork& work, const Block& block, const FactoredConstants<T>& c,
                                Visit&& visit) {
  const T* const line_roots = roots_of<T>(work.lines, block.slice) + block.line;
  const T* const place_roots = roots_of<T>(work.places, block.slice) + block.place;
  const T scale = scale_of<T>(work, block.slice);
  Elements<T> grad(work, kGrad, block);
  alignas(64) T update[kFactoredTile];
  for_patches(block, [&](const Patch& patch) {
    update_lines(c, grad.read(patch), line_roots + patch.line, scale, place_roots + patch.place, patch, update);
    visit(patch, update);
  });
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
  for_updates(work, block, c, [&](const Patch& patch, const T* u) {
    apply_update(c, param.read(patch), u, patch.elements());
    param.write(patch);
  });
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

  // Computes all new variances.
  void combine() const {
    combine_axis(kRowVar, job_.rows, job_.columns, job_.columns, 1);
    if (!is_vector()) combine_axis(kColumnVar, job_.columns, 1, job_.rows, job_.columns);
  }

  // Computes the update, with the variances as they are stored.
  void update(T* update) const {
    T row_roots[kFactoredTile];
    T column_roots[kFactoredTile];
    T scale[kFactoredTile];
    for (std::int64_t s = 0; s < count_; ++s) scale[s] = column_roots[s] = is_vector() ? T(1) : T(0);
    for (std::int64_t i = 0; i < job_.rows; ++i) {
      T* row = row_roots + i * count_;
      read(kRowVar, i, 0, row);
      if (!is_vector())
        for (std::int64_t s = 0; s < count_; ++s) scale[s] += row[s];
      for (std::int64_t s = 0; s < count_; ++s) row[s] = Adafactor::inverse_root(row[s]);
    }
    if (!is_vector()) {
      for (std::int64_t s = 0; s < count_; ++s) scale[s] = Adafactor::row_scale(scale[s] / T(job_.rows), c_.eps1);
      for (std::int64_t j = 0; j < job_.columns; ++j) {
        T* column = column_roots + j * count_;
        read(kColumnVar, 0, j, column);
        for (std::int64_t s = 0; s < count_; ++s) column[s] = Adafactor::inverse_root(column[s]);
      }
    }
    const T* g = grad_;
    for (std::int64_t i = 0; i < job_.rows; ++i)
      for (std::int64_t j = 0; j < job_.columns; ++j, g += count_, update += count_) {
        const T* row = row_roots + i * count_;
        const T* column = column_roots + j * count_;
#pragma GCC ivdep
        for (std::int64_t s = 0; s < count_; ++s)
          update[s] = Adafactor::update(c_.factor * g[s], row[s] * scale[s] * column[s], c_.limit);
      }
  }

 private:
  bool is_vector() const { return job_.operands[kColumnVar].data == nullptr; }

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

  // Computes the new variances of `length` rows (or columns) of `averaged` elements each. In the array of gradients,
  // rows are `pitch` apart, and elements of a row `step` apart.
  void combine_axis(std::size_t variance, std::int64_t length, std::int64_t pitch, std::int64_t averaged,
                    std::int64_t step) const {
    T sums[kFactoredTile];
    T stored[kFactoredTile];
    for (std::int64_t k = 0; k < length; ++k) {
      for (std::int64_t s = 0; s < count_; ++s) sums[s] = T(0);
      for (std::int64_t m = 0; m < averaged; ++m) {
        const T* g = grad_ + (k * pitch + m * step) * count_;
        for (std::int64_t s = 0; s < count_; ++s) sums[s] += (c_.factor * g[s]) * (c_.factor * g[s]);
      }
      read(variance, k, k, stored);  // its stride along the other axis is zero
      for (std::int64_t s = 0; s < count_; ++s) stored[s] = c_.average(stored[s], sums[s] / T(averaged));
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
  const T* param = lanes.read_all(kParam, tile);
  work.param_squares[index] = sum_of<T>(lanes.elements(), [&](std::int64_t k) { return param[k] * param[k]; });
  lanes.combine();
  lanes.update(tile);
  work.update_squares[index] = sum_of<T>(lanes.elements(), [&](std::int64_t k) { return tile[k] * tile[k]; });
}

template <class T>
void apply_lanes(const FactoredWork& work, std::int64_t index) {
  const Lanes<T> lanes(work, index);
  T update[kFactoredTile];
  T tile[kFactoredTile];
  lanes.update(update);
  T* const param = lanes.read_all(kParam, tile);
  apply_update(FactoredConstants<T>(work), param, update, lanes.elements());
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
            for (std::int64_t k = begin; k < end; ++k) combine_one<T>(work, k);
          },
      .norm =
          [](const FactoredWork& work, std::int64_t begin, std::int64_t end) {
            for (std::int64_t b = begin; b < end; ++b) norm_block<T>(work, b);
          },
      .apply =
          [](const FactoredWork& work, std::int64_t begin, std::int64_t end) {
            for (std::int64_t b = begin; b < end; ++b)
              work.lanes > 0 ? apply_lanes<T>(work, b) : apply_block<T>(work, b);
          },
  };
}

}  // namespace onepass::inline ONEPASS_TARGET
