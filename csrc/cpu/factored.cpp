#include "cpu/factored.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <utility>
#include <vector>

#include "cpu/dispatch.h"
#include "cpu/fpmode.h"
#include "cpu/team.h"

namespace onepass {
namespace {

// Slices of up to this many elements are small, and several are stepped at once.
constexpr std::int64_t kSmallSlice = 64;
// A line runs along the inner dimension of the parameter in memory, or along the other one if the inner dimension is
// shorter than this, and than the other one.
constexpr std::int64_t kFewPlaces = 16;
// Elements that a thread takes at once: some 30 us.
constexpr std::int64_t kPiece = std::int64_t{64} << 10;
// Tensors go through the phases together, up to this many elements for each thread, so that the next phase finds in the
// cache what the last one has read.
constexpr std::int64_t kBatch = std::int64_t{512} << 10;

double* take_numbers(std::int64_t count, FactoredRoom& room) {
  return static_cast<double*>(room.take(static_cast<std::size_t>(count) * sizeof(double)));
}

// Returns the axes, of which the variances are these operands, with memory for their sums.
Factors make_factors(const FactoredJob& job, std::size_t row_var, std::size_t column_var, FactoredRoom& room) {
  Factors factors{
      .lines = {.length = job.rows, .strides = job.row_strides, .variance = row_var, .is_rows = true},
      .places = {.length = job.columns, .strides = job.column_strides, .variance = column_var},
      .row_totals = take_numbers(job.slices * blocks_in(job.rows, kFactoredTile), room),
  };
  const auto swap_axes = [&] { std::swap(factors.lines, factors.places); };
  if (job.row_strides[kParam] < job.column_strides[kParam]) swap_axes();
  if (factors.places.length < kFewPlaces && factors.places.length < factors.lines.length) swap_axes();
  factors.lines.parts = blocks_in(factors.places.length, kBlockWidth);
  factors.places.parts = blocks_in(factors.lines.length, kBlockLines);
  for (FactoredAxis* axis : {&factors.lines, &factors.places}) {
    const std::size_t size = job.wide ? sizeof(double) : sizeof(float);
    axis->sums = room.take(static_cast<std::size_t>(job.slices * axis->parts * axis->length) * size);
  }
  return factors;
}

// Divides a job into blocks, and takes memory for their sums.
FactoredWork divide(const FactoredJob& job, FactoredRoom& room) {
  FactoredWork work;
  work.job = &job;
  if (job.rows * job.columns <= kSmallSlice) {
    work.lanes = kFactoredTile / (job.rows * job.columns);
    work.blocks = blocks_in(job.slices, work.lanes);
  } else {
    work.squares = make_factors(job, kRowVar, kColumnVar, room);
    if (job.is_came) work.residuals = make_factors(job, kResidualRowVar, kResidualColumnVar, room);
    const auto& [lines, places, totals] = work.squares;
    work.blocks = job.slices * lines.parts * places.parts;
    work.combinations = job.slices * (blocks_in(lines.length, kFactoredTile) + blocks_in(places.length, kFactoredTile));
  }
  work.param_squares = take_numbers(work.blocks, room);
  work.update_squares = take_numbers(work.blocks, room);
  return work;
}

// A range of one job's blocks or combinations.
struct Piece {
  const FactoredWork* work;
  std::int64_t begin, end;
};

// Returns how many of a job's blocks or combinations, of which there are `total`, are a piece.
std::int64_t size_of_piece(const FactoredWork& work, std::int64_t total) {
  return std::max<std::int64_t>(1, kPiece * total / work.job->length());
}

// Returns how many pieces a job has at most in a phase.
std::size_t most_pieces(const FactoredWork& work) {
  std::int64_t most = 0;
  for (const std::int64_t total : {work.blocks, work.combinations})
    if (total > 0) most = std::max(most, blocks_in(total, size_of_piece(work, total)));
  return static_cast<std::size_t>(most);
}

// Runs one phase over all jobs of a batch. `count` returns the number of a job's blocks or combinations. `pieces` is
// overwritten; its capacity suffices for every phase, so nothing is allocated.
template <class Count>
void run_phase(std::span<const FactoredWork> batch, std::vector<Piece>& pieces, FactoredKernel FactoredKernels::* phase,
               int team, Count&& count) {
  pieces.clear();
  for (const FactoredWork& work : batch) {
    const std::int64_t total = count(work);
    if (total == 0) continue;
    const std::int64_t most = size_of_piece(work, total);
    for (std::int64_t begin = 0; begin < total; begin += most)
      pieces.push_back({&work, begin, std::min(total, begin + most)});
  }
  if (pieces.empty()) return;
  const Kernels& kernels = active_isa().kernels;
  std::atomic<std::size_t> next = 0;
  on_team(team, [&](int, int) {
    for (std::size_t i = next++; i < pieces.size(); i = next++) {
      const auto& [work, begin, end] = pieces[i];
      (kernels.of_type(work->job->wide).factored.*phase)(*work, begin, end);
    }
  });
}

double sum_in_order(const double* numbers, std::int64_t count) {
  double sum = 0.0;
  for (std::int64_t i = 0; i < count; ++i) sum += numbers[i];
  return sum;
}

// Adds up the totals of each slice's rows, and writes the sum over the first. Each block reads it.
void add_row_totals(const FactoredJob& job, const Factors& factors) {
  const std::int64_t tiles = blocks_in(job.rows, kFactoredTile);
  if (factors.row_totals == nullptr || tiles == 1) return;
  for (std::int64_t slice = 0; slice < job.slices; ++slice) {
    double* const totals = factors.row_totals + slice * tiles;
    totals[0] = sum_in_order(totals, tiles);
  }
}

void run_batch(std::span<FactoredWork> batch, std::vector<Piece>& pieces, std::int64_t bytes, int threads) {
  const int team = team_size(bytes, threads);
  const auto blocks = [](const FactoredWork& work) { return work.blocks; };
  const auto large_blocks = [](const FactoredWork& work) { return work.lanes > 0 ? 0 : work.blocks; };
  const auto combinations = [](const FactoredWork& work) { return work.combinations; };
  const auto of_came = [](auto&& count) {
    return [count](const FactoredWork& work) { return work.job->is_came ? count(work) : 0; };
  };
  const StepMode mode;  // of what this thread computes between the phases
  run_phase(batch, pieces, &FactoredKernels::measure, team, blocks);
  run_phase(batch, pieces, &FactoredKernels::combine, team, combinations);
  for (const FactoredWork& work : batch) add_row_totals(*work.job, work.squares);
  run_phase(batch, pieces, &FactoredKernels::norm, team, large_blocks);
  for (FactoredWork& work : batch) {
    const auto length = static_cast<double>(work.job->length());
    const double rms_update = std::sqrt(sum_in_order(work.update_squares, work.blocks) / length);
    if (work.job->is_came) {
      work.clipping = Came::clipping(work.job->came, rms_update);
      work.step_size = work.job->came.lr;
    } else {
      const double rms_param = std::sqrt(sum_in_order(work.param_squares, work.blocks) / length);
      work.step_size = Adafactor::step_size(work.job->adafactor, rms_param, rms_update);
    }
  }
  run_phase(batch, pieces, &FactoredKernels::average, team, of_came(large_blocks));
  run_phase(batch, pieces, &FactoredKernels::combine_residuals, team, of_came(combinations));
  for (const FactoredWork& work : batch) add_row_totals(*work.job, work.residuals);
  run_phase(batch, pieces, &FactoredKernels::apply, team, blocks);
}

}  // namespace

void* FactoredRoom::take(std::size_t bytes) {
  bytes = (bytes + 63) / 64 * 64;
  if (used_ + bytes > size_) {
    const std::size_t size = std::max({bytes, 2 * size_, std::size_t{4096}});
    blocks_.push_back(std::make_unique_for_overwrite<std::byte[]>(size));
    size_ = size;
    total_ += size;
    used_ = 0;
  }
  used_ += bytes;
  return blocks_.back().get() + used_ - bytes;
}

void FactoredRoom::clear() {
  if (blocks_.size() > 1) {
    auto one = std::make_unique_for_overwrite<std::byte[]>(total_);
    blocks_.clear();
    blocks_.push_back(std::move(one));
    size_ = total_;
  }
  used_ = 0;
}

void run_factored(std::span<const FactoredJob> jobs, int threads, FactoredRoom& room) {
  std::vector<FactoredWork> batch;
  batch.reserve(jobs.size());
  std::vector<Piece> pieces;
  std::size_t count = 0;  // pieces of the current batch
  std::int64_t all = 0;
  for (const FactoredJob& job : jobs) all += job.length();
  // With several batches, a first pass only allocates, so that nothing has been written if an allocation fails.
  for (bool runs = all <= kBatch * threads;; runs = true) {
    std::int64_t elements = 0;
    std::int64_t bytes = 0;
    const auto flush = [&] {
      pieces.reserve(count);
      if (runs) {
        run_batch(batch, pieces, bytes, threads);
        room.rewind();
      } else {
        room.clear();
      }
      batch.clear();
      elements = bytes = 0;
      count = 0;
    };
    room.clear();  // an earlier step may have ended by an exception
    for (const FactoredJob& job : jobs) {
      const std::int64_t length = job.length();
      if (length == 0) continue;
      if (elements + length > kBatch * threads && !batch.empty()) flush();
      batch.push_back(divide(job, room));
      count += most_pieces(batch.back());
      elements += length;
      std::size_t of_element = size_of(job.operands[kParam].format) + size_of(job.operands[kGrad].format);
      if (job.is_came) of_element += size_of(job.operands[kMomentum].format);
      bytes += length * static_cast<std::int64_t>(of_element);
    }
    if (!batch.empty()) flush();
    if (runs) return;
  }
}

}  // namespace onepass
