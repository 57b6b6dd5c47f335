// run_factored: Adafactor's and CAME's steps against their formulas in long double, on every instruction set and number
// of threads.
#include "cpu/factored.h"

#include <doctest/doctest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <deque>
#include <limits>
#include <span>
#include <string_view>
#include <utility>
#include <vector>

#include "cases.h"
#include "layout.h"
#include "reference.h"

namespace onepass::testing {
namespace {

constexpr AdafactorHyper kHyper{
    .lr = 0.05, .beta2_decay = -0.8, .eps1 = 1e-7, .eps2 = 1e-3, .d = 1.0, .weight_decay = 0.1};

constexpr CameHyper kCameHyper{.lr = 0.05,
                               .beta1 = 0.9,
                               .beta2 = 0.95,
                               .beta3 = 0.97,
                               .eps1 = 1e-30,
                               .eps2 = 1e-16,
                               .clip_threshold = 0.7,
                               .weight_decay = 0.1};

struct Options {
  std::array<Format, kFactoredOperands> formats{};  // float32
  bool wide = false;
  double grad_factor = 1.0;
  bool transposed = false;  // parameter and gradient with rows innermost
  bool spaced = false;      // gaps between all rows, columns and slices
  AdafactorHyper hyper = kHyper;
  double step = 3;
  bool came = false;
  CameHyper came_hyper = kCameHyper;
};

// A tensor of slices x rows x columns, and its states; a vector if `vector`.
struct FactoredProblem {
  std::int64_t slices, rows, columns;
  bool vector;
  Options options;
  std::vector<Tensor> tensors;  // in the order of the operands; those that it does not have are empty

  bool has(std::size_t k) const {
    if (k == kMomentum) return options.came;
    return k <= kRowVar || (!vector && (k == kColumnVar || options.came));
  }
  static bool is_of_rows(std::size_t k) { return k == kRowVar || k == kResidualRowVar; }
  static bool is_of_columns(std::size_t k) { return k == kColumnVar || k == kResidualColumnVar; }
  std::array<std::int64_t, 3> shape_of_operand(std::size_t k) const {
    return {slices, is_of_columns(k) ? 1 : rows, is_of_rows(k) ? 1 : columns};
  }
};

FactoredProblem make(std::int64_t slices, std::int64_t rows, std::int64_t columns, const Options& options = {}) {
  FactoredProblem problem{slices, rows, columns, rows * columns == 1 && slices > 1, options, {}};
  for (std::size_t k = 0; k < kFactoredOperands; ++k) {
    Tensor& tensor = problem.tensors.emplace_back();
    if (!problem.has(k)) continue;
    tensor.format = options.formats[k];
    const auto shape = problem.shape_of_operand(k);
    const std::int64_t gap = options.spaced ? 2 : 1;
    tensor.strides = {shape[1] * shape[2] * gap * gap * gap, shape[2] * gap * gap, gap};
    if (options.transposed) tensor.strides = {shape[1] * shape[2] * gap * gap * gap, gap, shape[1] * gap * gap};
    const std::int64_t elements = std::max<std::int64_t>(1, slices * tensor.strides[0] + 1);
    tensor.first = kGuardBefore + 4 * k;
    tensor.memory = Memory(tensor.first + static_cast<std::size_t>(elements) * size_of(tensor.format) + kGuardAfter);
    for_each_index({shape[0], shape[1], shape[2]}, [&](const auto& index) {
      const std::int64_t offset = offset_of(index, tensor.strides);
      const double value = number(static_cast<std::uint64_t>(offset) * kFactoredOperands + k);
      store(tensor, offset, k < kFirstState || k == kMomentum ? value : value * value);
    });
  }
  return problem;
}

class Bound {
 public:
  explicit Bound(FactoredProblem& problem) {
    job_.slices = problem.slices;
    job_.rows = problem.rows;
    job_.columns = problem.columns;
    std::array<std::span<const std::int64_t>, kMaxOperands> strides;
    for (std::size_t k = 0; k < kFactoredOperands; ++k) {
      if (!problem.has(k)) continue;
      Tensor& tensor = problem.tensors[k];
      job_.operands[k] = {tensor.at(0), tensor.format};
      job_.row_strides[k] = FactoredProblem::is_of_columns(k) ? 0 : tensor.strides[1];
      job_.column_strides[k] = FactoredProblem::is_of_rows(k) ? 0 : tensor.strides[2];
      strides[k] = {tensor.strides.data(), 1};
    }
    const std::array slices{problem.slices};
    layout_ = make_layout(slices, strides);
    job_.batch = problem.slices < 2 || is_flat(layout_) ? nullptr : &layout_;
    job_.is_came = problem.options.came;
    job_.adafactor = Adafactor::prepare(problem.options.hyper, problem.options.step);
    job_.came = Came::prepare(problem.options.came_hyper, problem.options.step);
    job_.grad_factor = problem.options.grad_factor;
    job_.wide = problem.options.wide;
  }
  Bound(const Bound&) = delete;
  const FactoredJob& job() const { return job_; }

 private:
  Layout layout_;
  FactoredJob job_;
};

void step(std::vector<FactoredProblem>& problems, int threads) {
  std::deque<Bound> bound;
  std::vector<FactoredJob> jobs;
  for (FactoredProblem& problem : problems) jobs.push_back(bound.emplace_back(problem).job());
  FactoredRoom room;
  run_factored(jobs, threads, room);
}

bool same_bytes(const FactoredProblem& a, const FactoredProblem& b) {
  for (std::size_t k = 0; k < kFactoredOperands; ++k) {
    if (!a.has(k)) continue;
    const Memory& one = a.tensors[k].memory;
    const Memory& other = b.tensors[k].memory;
    if (std::memcmp(one.data(), other.data(), one.size()) != 0) return false;
  }
  return true;
}

// -- the reference ---------------------------------------------------------------------------------------------------

using Real = long double;
using Numbers = std::vector<Real>;

// A step treats denormals as zero, those of the arithmetic type and those that are stored. float16's denormals are not
// denormal in float32.
Numbers numbers_of(FactoredProblem& problem, std::size_t k) {
  Numbers all;
  if (!problem.has(k)) return all;
  const double least = problem.options.wide && problem.tensors[k].format == Format::float64
                           ? std::numeric_limits<double>::min()
                           : double{std::numeric_limits<float>::min()};
  const auto shape = problem.shape_of_operand(k);
  for_each_index({shape[0], shape[1], shape[2]}, [&](const auto& index) {
    const auto value = load<double>(problem.tensors[k], offset_of(index, problem.tensors[k].strides));
    all.push_back(std::fabs(value) < least ? 0.0 : value);
  });
  return all;
}

// Adafactor's formulas in torch's form. If the variances that a step has stored are given, the update uses them.
struct Expected {
  Numbers param, row_var, column_var;
};

Expected reference(FactoredProblem& problem, const Numbers* stored_rows = nullptr,
                   const Numbers* stored_columns = nullptr) {
  const auto& [lr, beta2_decay, eps1, eps2, d, weight_decay] = problem.options.hyper;
  const Real weight = std::pow(Real(problem.options.step), Real(beta2_decay));
  const std::int64_t rows = problem.rows;
  const std::int64_t columns = problem.columns;
  const Numbers p = numbers_of(problem, kParam);
  Numbers g = numbers_of(problem, kGrad);
  for (Real& x : g) x *= problem.options.grad_factor;
  Expected want{p, numbers_of(problem, kRowVar), {}};
  if (!problem.vector) want.column_var = numbers_of(problem, kColumnVar);
  const auto at = [&](std::int64_t s, std::int64_t i, std::int64_t j) { return (s * rows + i) * columns + j; };

  Real squares = 0;
  for (const Real x : p) squares += x * x;
  const Real length = Real(p.size());
  const Real alpha =
      std::max(Real(eps2), std::sqrt(squares / length)) * std::min(Real(lr), 1 / std::sqrt(Real(problem.options.step)));
  for (std::int64_t s = 0; s < problem.slices; ++s) {
    for (std::int64_t i = 0; i < rows; ++i) {
      Real sum = 0;
      for (std::int64_t j = 0; j < columns; ++j) sum += g[at(s, i, j)] * g[at(s, i, j)];
      Real& var = want.row_var[s * rows + i];
      var += weight * (sum / columns - var);
    }
    for (std::int64_t j = 0; j < columns && !problem.vector; ++j) {
      Real sum = 0;
      for (std::int64_t i = 0; i < rows; ++i) sum += g[at(s, i, j)] * g[at(s, i, j)];
      Real& var = want.column_var[s * columns + j];
      var += weight * (sum / rows - var);
    }
  }
  const Numbers& row_var = stored_rows != nullptr ? *stored_rows : want.row_var;
  const Numbers& column_var = stored_columns != nullptr ? *stored_columns : want.column_var;
  Numbers u = g;
  Real update_squares = 0;
  for (std::int64_t s = 0; s < problem.slices; ++s) {
    Real mean = 0;
    for (std::int64_t i = 0; i < rows; ++i) mean += row_var[s * rows + i] / rows;
    for (std::int64_t i = 0; i < rows; ++i)
      for (std::int64_t j = 0; j < columns; ++j) {
        Real v = row_var[s * rows + i];
        if (!problem.vector) v *= column_var[s * columns + j] / std::max(mean, Real(eps1));
        Real& x = u[at(s, i, j)];
        x /= std::sqrt(std::max(v, Real(eps1) * Real(eps1)));
        update_squares += x * x;
      }
  }
  const Real clip = std::max(Real(1), std::sqrt(update_squares / length) / Real(d));
  for (std::size_t k = 0; k < p.size(); ++k)
    want.param[k] = p[k] - Real(lr) * Real(weight_decay) * p[k] - alpha / clip * u[k];
  return want;
}

// Returns the mean of each row, or of each column.
Numbers means(const FactoredProblem& problem, const Numbers& values, bool of_rows) {
  Numbers sums(static_cast<std::size_t>(problem.slices * (of_rows ? problem.rows : problem.columns)));
  std::size_t at = 0;
  for (std::int64_t s = 0; s < problem.slices; ++s)
    for (std::int64_t i = 0; i < problem.rows; ++i)
      for (std::int64_t j = 0; j < problem.columns; ++j)
        sums[static_cast<std::size_t>(of_rows ? s * problem.rows + i : s * problem.columns + j)] += values[at++];
  for (Real& sum : sums) sum /= Real(of_rows ? problem.columns : problem.rows);
  return sums;
}

Numbers averaged(const Numbers& old, const Numbers& means, double beta, double eps) {
  Numbers result = old;
  for (std::size_t k = 0; k < old.size(); ++k) result[k] = beta * old[k] + (1 - Real(beta)) * (means[k] + eps);
  return result;
}

// Returns values divided by the roots of their second moments; of a vector, `rows` are the moments.
Numbers divided(const FactoredProblem& problem, Numbers values, const Numbers& rows, const Numbers& columns) {
  std::size_t at = 0;
  for (std::int64_t s = 0; s < problem.slices; ++s) {
    Real mean = 0;
    for (std::int64_t i = 0; i < problem.rows; ++i) mean += rows[s * problem.rows + i] / Real(problem.rows);
    for (std::int64_t i = 0; i < problem.rows; ++i)
      for (std::int64_t j = 0; j < problem.columns; ++j) {
        Real v = rows[s * problem.rows + i];
        if (!problem.vector) v *= columns[s * problem.columns + j] / mean;
        values[at++] /= std::sqrt(v);
      }
  }
  return values;
}

// What a step of CAME makes of all operands, by the formulas of the paper, from the states as the step has stored them.
// A residual is a difference, whose rounding errors are those of its operands: `sizes` has their squares' part in it.
struct ExpectedOfCame {
  std::array<Numbers, kFactoredOperands> numbers, sizes;
};

ExpectedOfCame came_reference(FactoredProblem& before, FactoredProblem& after) {
  const CameHyper& h = before.options.came_hyper;
  const auto squared = [](Numbers values) {
    for (Real& x : values) x *= x;
    return values;
  };
  ExpectedOfCame expected;
  auto& want = expected.numbers;
  Numbers g = numbers_of(before, kGrad);
  for (Real& x : g) x *= before.options.grad_factor;
  want[kRowVar] = averaged(numbers_of(before, kRowVar), means(before, squared(g), true), h.beta2, h.eps1);
  if (!before.vector)
    want[kColumnVar] = averaged(numbers_of(before, kColumnVar), means(before, squared(g), false), h.beta2, h.eps1);
  Numbers u = divided(before, g, numbers_of(after, kRowVar), numbers_of(after, kColumnVar));
  Real squares = 0;
  for (const Real x : u) squares += x * x;
  const Real clip = std::max(Real(1), std::sqrt(squares / Real(u.size())) / Real(h.clip_threshold));
  for (Real& x : u) x /= clip;
  want[kMomentum] = numbers_of(before, kMomentum);
  for (std::size_t k = 0; k < u.size(); ++k)
    want[kMomentum][k] = h.beta1 * want[kMomentum][k] + (1 - Real(h.beta1)) * u[k];
  Numbers change = numbers_of(after, kMomentum);
  if (!before.vector) {
    Numbers sizes = u;
    for (std::size_t k = 0; k < u.size(); ++k) {
      sizes[k] = std::fabs(u[k]) + std::fabs(change[k]);
      u[k] -= change[k];
    }
    for (const std::size_t k : {kResidualRowVar, kResidualColumnVar}) {
      const bool of_rows = k == kResidualRowVar;
      const Numbers old = numbers_of(before, k);
      want[k] = averaged(old, means(before, squared(u), of_rows), h.beta3, h.eps2);
      expected.sizes[k] = averaged(Numbers(old.size()), means(before, squared(sizes), of_rows), h.beta3, 0.0);
    }
    change = divided(before, change, numbers_of(after, kResidualRowVar), numbers_of(after, kResidualColumnVar));
  }
  want[kParam] = numbers_of(before, kParam);
  for (std::size_t k = 0; k < change.size(); ++k)
    want[kParam][k] -= Real(h.lr) * (Real(h.weight_decay) * want[kParam][k] + change[k]);
  return expected;
}

// Returns half the distance from 1 to the next larger number.
double rounding_of(Format format) {
  switch (format) {
    case Format::float64:
      return 0x1p-53;
    case Format::float32:
      return 0x1p-24;
    case Format::bfloat16:
      return 0x1p-8;
    case Format::float16:
      return 0x1p-11;
    case Format::float8_e4m3fn:  // these optimizers have no such states
      break;
  }
  return 0;
}

// Whether a value is within a dozen rounding errors of the arithmetic and one of the storage. `sizes`: of numbers whose
// rounding errors count, too.
void check_close(const Numbers& got, const Numbers& want, const Numbers& old, Format format, bool wide,
                 const Numbers& sizes = {}) {
  REQUIRE(got.size() == want.size());
  const double arithmetic = rounding_of(wide ? Format::float64 : Format::float32);
  Real worst = 0;
  for (std::size_t k = 0; k < got.size(); ++k) {
    const Real size = std::fabs(want[k]) + std::fabs(want[k] - old[k]) + (sizes.empty() ? 0 : sizes[k]);
    // float16's smallest numbers are 2^-24 apart. Below float32's smallest, arithmetic or conversions flush.
    const Real spacing = format == Format::float16 ? 0x1p-25 : 2 * Real(std::numeric_limits<float>::min());
    const Real room = 12 * arithmetic * size + 1.01 * rounding_of(format) * std::fabs(want[k]) + spacing;
    worst = std::max(worst, std::fabs(got[k] - want[k]) / room);
  }
  CHECK(double(worst) <= 1.0);
}

void check(const FactoredProblem& before, FactoredProblem& after) {
  FactoredProblem copy = before;
  const Memory& gradient = before.tensors[kGrad].memory;
  CHECK(std::memcmp(gradient.data(), after.tensors[kGrad].memory.data(), gradient.size()) == 0);
  if (before.options.came) {
    const auto [want, sizes] = came_reference(copy, after);
    for (std::size_t k = 0; k < kFactoredOperands; ++k) {
      if (!before.has(k) || k == kGrad) continue;
      CAPTURE(k);
      check_close(numbers_of(after, k), want[k], numbers_of(copy, k), after.tensors[k].format, after.options.wide,
                  sizes[k]);
    }
    return;
  }
  const Numbers rows = numbers_of(after, kRowVar);
  const Numbers columns = after.vector ? Numbers{} : numbers_of(after, kColumnVar);
  const Expected want = reference(copy, &rows, &columns);
  check_close(rows, want.row_var, numbers_of(copy, kRowVar), after.tensors[kRowVar].format, after.options.wide);
  if (!after.vector)
    check_close(columns, want.column_var, numbers_of(copy, kColumnVar), after.tensors[kColumnVar].format,
                after.options.wide);
  check_close(numbers_of(after, kParam), want.param, numbers_of(copy, kParam), after.tensors[kParam].format,
              after.options.wide);
}

// -- tests -----------------------------------------------------------------------------------------------------------

// Small and large slices; vectors; every way that an axis can end in a block or a tile; rows as lines and as places.
constexpr std::array<std::int64_t, 3> kShapes[] = {
    {1, 1, 1},    {1, 1, 2},      {1, 2, 1},    {1, 3, 4},     {1, 8, 8},    {5, 8, 8},     {17, 8, 8},
    {1, 13, 5},   {7, 1, 1},      {1024, 1, 1}, {1025, 1, 1},  {5000, 1, 1}, {2000, 3, 3},  {341, 3, 1},
    {700, 1, 3},  {1, 65, 1},     {1, 1, 65},   {1, 64, 16},   {1, 65, 17},  {3, 63, 33},   {1, 130, 100},
    {2, 9, 8},    {2, 8, 9},      {1, 700, 3},  {2, 3, 1500},  {1, 2, 1024}, {1, 66, 1025}, {1, 3, 4096},
    {1, 5, 4173}, {1, 1, 10'000}, {1, 9000, 1}, {1, 9000, 15}, {1, 4200, 7}, {1, 1100, 20}, {1, 200, 2048},
};

TEST_CASE("every shape, by the formulas and within their roundings") {
  for (const bool came : {false, true})
    for (const bool wide : {false, true})
      for (const auto& [slices, rows, columns] : kShapes) {
        CAPTURE(came);
        CAPTURE(wide);
        CAPTURE(slices);
        CAPTURE(rows);
        CAPTURE(columns);
        Options options{.wide = wide, .grad_factor = -0.5, .came = came};
        if (wide) options.formats.fill(Format::float64);
        const FactoredProblem before = make(slices, rows, columns, options);
        std::vector<FactoredProblem> after{before};
        step(after, 1);
        check(before, after[0]);
      }
}

TEST_CASE("every format, and strides of every kind") {
  using enum Format;
  constexpr std::array<Format, 4> all{float32, float64, bfloat16, float16};
  for (const auto& [slices, rows, columns] :
       {std::array<std::int64_t, 3>{40, 3, 3}, {1500, 1, 1}, {2, 70, 1100}, {1, 300, 3}})
    for (const Format param : all)
      for (std::size_t k = 0; k < 8; ++k) {
        const std::size_t shift = k % 4;
        Options options{.wide = param == float64, .transposed = shift % 2 == 1, .spaced = shift >= 2, .came = k >= 4};
        // Second moments of CAME in float16 would be smaller than its smallest number.
        const Format small = options.came ? float32 : all[(shift + 3) % 4];
        const Format mean = options.came ? float64 : all[(shift + 1) % 4];
        options.formats = {param, all[shift], mean, small, all[(shift + 1) % 4], small, mean};
        CAPTURE(options.came);
        CAPTURE(slices);
        CAPTURE(columns);
        CAPTURE(std::string_view(name_of(param)));
        CAPTURE(shift);
        const FactoredProblem before = make(slices, rows, columns, options);
        std::vector<FactoredProblem> after{before};
        step(after, 1);
        check(before, after[0]);
      }
}

// Tensors of all kinds, large enough together for five threads and for several batches.
std::vector<FactoredProblem> model() {
  using enum Format;
  std::vector<FactoredProblem> problems;
  for (const auto& [slices, rows, columns] : kShapes) problems.push_back(make(slices, rows, columns));
  problems.push_back(make(1, 0, 7));
  problems.push_back(make(0, 4, 4));
  problems.push_back(make(1, 900, 1100));
  problems.push_back(make(400'000, 1, 1));
  problems.push_back(make(1, 700, 800, {.formats = {bfloat16, float32, float32, bfloat16}, .spaced = true}));
  problems.push_back(make(1, 300, 4100, {.formats = {float64, float64, float64, float64}, .wide = true}));
  problems.push_back(make(20'000, 3, 3, {.transposed = true}));
  for (const auto& [slices, rows, columns] : kShapes) problems.push_back(make(slices, rows, columns, {.came = true}));
  problems.push_back(make(1, 900, 1100, {.came = true}));
  problems.push_back(make(400'000, 1, 1, {.came = true}));
  problems.push_back(make(1, 0, 7, {.came = true}));
  for (std::int64_t n = 0; n < 300; ++n) problems.push_back(make(n % 37, 1, 1));
  return problems;
}

TEST_CASE("every shape of the model, by the formulas and within their roundings") {
  const std::vector<FactoredProblem> before = model();
  std::vector<FactoredProblem> after = before;
  step(after, 1);
  for (std::size_t i = 0; i < before.size(); ++i)
    if (before[i].slices * before[i].rows * before[i].columns > 0) check(before[i], after[i]);
}

TEST_CASE("every instruction set and number of threads gives the same bits") {
  const std::vector<FactoredProblem> before = model();
  std::vector<FactoredProblem> want = before;
  force_isa(supported_isas().back().name);
  step(want, 1);
  for (const Isa& isa : supported_isas()) {
    CAPTURE(std::string_view(isa.name));
    force_isa(isa.name);
    for (const int threads : {1, 2, 3, 5}) {
      CAPTURE(threads);
      std::vector<FactoredProblem> got = before;
      step(got, threads);
      for (std::size_t i = 0; i < got.size(); ++i) {
        CAPTURE(i);
        CHECK(same_bytes(got[i], want[i]));
      }
    }
  }
  force_isa("");
}

TEST_CASE("a tensor's bits depend neither on its neighbours nor on the old contents of the memory for sums") {
  std::vector<FactoredProblem> together = model();
  const std::vector<FactoredProblem> before = together;
  step(together, 2);
  FactoredRoom room;
  for (std::size_t i = 0; i < before.size(); ++i) {
    CAPTURE(i);
    FactoredProblem alone = before[i];
    const Bound bound(alone);
    run_factored({&bound.job(), 1}, 1, room);
    CHECK(same_bytes(alone, together[i]));
  }
}

TEST_CASE("no work") {
  FactoredRoom room;
  run_factored({}, 4, room);
  for (const bool came : {false, true})
    for (const auto& [slices, rows, columns] :
         {std::array<std::int64_t, 3>{0, 1, 1}, {1, 0, 5}, {1, 5, 0}, {0, 70, 70}}) {
      const FactoredProblem before = make(slices, rows, columns, {.came = came});
      std::vector<FactoredProblem> after{before};
      step(after, 2);
      CHECK(same_bytes(before, after[0]));
    }
}

// A variance of zero with the limit 1 / eps1 and without a limit; the clipping and the lower bound of the step size.
TEST_CASE("the limits") {
  const auto one = [](double gradient, double param, AdafactorHyper hyper, std::int64_t n) {
    std::vector<FactoredProblem> problems{make(1, n, n, {.hyper = hyper, .step = 1})};
    for (std::int64_t i = 0; i < n * n; ++i) {
      store(problems[0].tensors[kGrad], i, gradient);
      store(problems[0].tensors[kParam], i, param);
    }
    for (std::int64_t i = 0; i < n; ++i) {
      store(problems[0].tensors[kRowVar], i, 0.0);
      store(problems[0].tensors[kColumnVar], i, 0.0);
    }
    step(problems, 1);
    return load<double>(problems[0].tensors[kParam], 0);
  };
  for (const std::int64_t n : {4, 32}) {
    CAPTURE(n);
    AdafactorHyper hyper{.lr = 0.25, .beta2_decay = -0.5, .eps1 = 0x1p-4, .eps2 = 0.5, .d = 1, .weight_decay = 0};
    CHECK(one(2.0, 4.0, hyper, n) == 4.0 - 0.25 * 4.0);            // u = 1, the step as large as the parameter
    CHECK(one(2.0, 0.125, hyper, n) == 0.125 - 0.25 * 0.5);        // eps2 at least
    CHECK(one(0x1p-6, 4.0, hyper, n) == 4.0 - 0.25 * 4.0 * 0.25);  // u = g / eps1
    CHECK(one(0.0, 4.0, hyper, n) == 4.0);
    hyper.weight_decay = 0.5;
    CHECK(one(0.0, 4.0, hyper, n) == 3.5);
    hyper.eps1 = 0.0;
    CHECK(std::isnan(one(0.0, 4.0, hyper, n)));  // 0 / 0, as in torch
  }
}

// CAME by hand, with gradients and parameters that are all alike, so that all means are, too.
TEST_CASE("CAME's first step") {
  const auto one = [](double gradient, CameHyper hyper, std::int64_t slices, std::int64_t n) {
    std::vector<FactoredProblem> problems{make(slices, n, n, {.came = true, .came_hyper = hyper})};
    for (std::size_t k = 0; k < kFactoredOperands; ++k) {
      if (!problems[0].has(k)) continue;
      const double value = k == kParam ? 4.0 : k == kGrad ? gradient : 0.0;
      const auto shape = problems[0].shape_of_operand(k);
      for (std::int64_t i = 0; i < shape[0] * shape[1] * shape[2]; ++i) store(problems[0].tensors[k], i, value);
    }
    step(problems, 1);
    return load<double>(problems[0].tensors[kParam], 0);
  };
  CameHyper hyper{.lr = 0.5,
                  .beta1 = 0.5,
                  .beta2 = 0.75,
                  .beta3 = 0.0,
                  .eps1 = 0.0,
                  .eps2 = 0.0,
                  .clip_threshold = 4.0,
                  .weight_decay = 0.0};
  // u = g / sqrt(g^2 / 4) = 2, m = u / 2 = 1, and the residual's root is u - m = 1.
  for (const std::int64_t n : {4, 32}) CHECK(one(3.0, hyper, 1, n) == 4.0 - 0.5 * 1.0);
  CHECK(one(3.0, hyper, 100, 1) == 4.0 - 0.5 * 1.0);
  hyper.clip_threshold = 0.5;  // u = 0.5, m = 0.25: only a vector's step is smaller
  for (const std::int64_t n : {4, 32}) CHECK(one(3.0, hyper, 1, n) == 4.0 - 0.5 * 1.0);
  CHECK(one(3.0, hyper, 100, 1) == 4.0 - 0.5 * 0.25);
  hyper.eps2 = 15.0 / 16.0;  // the residual is 1/16, so its root is 1
  for (const std::int64_t n : {4, 32}) CHECK(one(3.0, hyper, 1, n) == 4.0 - 0.5 * 0.25);
  hyper.eps1 = hyper.eps2 = 0x1p-20;
  hyper.weight_decay = 0.25;
  for (const std::int64_t n : {4, 32}) CHECK(one(0.0, hyper, 1, n) == 4.0 - 0.5 * 0.25 * 4.0);
  CHECK(one(0.0, hyper, 100, 1) == 4.0 - 0.5 * 0.25 * 4.0);
}

}  // namespace
}  // namespace onepass::testing
