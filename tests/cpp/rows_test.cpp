// Sparse gradients: the order of their entries, and steps of the rows that they touch, to the bit.
#include "cpu/rows.h"

#include <doctest/doctest.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <deque>
#include <initializer_list>
#include <map>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include "cases.h"
#include "cpu/fpmode.h"
#include "cpu/step.h"
#include "reference.h"

namespace onepass::testing {
namespace {

// -- entries ---------------------------------------------------------------------------------------------------------

Indices indices_of(const std::vector<std::int64_t>& numbers, std::int64_t entries) {
  return {.data = numbers.data(), .entries = entries, .strides = {entries, 1}};
}

std::vector<std::int64_t> row_numbers(const Rows& rows) {
  std::vector<std::int64_t> numbers;
  for (const Rows::Entry& entry : rows.entries) numbers.push_back(entry.row);
  return numbers;
}

std::vector<std::int64_t> positions(const Rows& rows) {
  std::vector<std::int64_t> found;
  for (const Rows::Entry& entry : rows.entries) found.push_back(entry.position);
  return found;
}

using Numbers = std::vector<std::int64_t>;

TEST_CASE("indices become row numbers, the last dimension fastest") {
  CHECK(row_numbers(read_rows(indices_of({4, 0, 2}, 3), Numbers{5}, 7)) == Numbers{4, 0, 2});
  CHECK(row_numbers(read_rows(indices_of({4, 0, 2, 1, 2, 0}, 3), Numbers{5, 3}, 1)) == Numbers{13, 2, 6});
  CHECK(row_numbers(read_rows(indices_of({1, 1, 2, 0, 3, 3}, 2), Numbers{2, 3, 4}, 1)) == Numbers{23, 15});
  CHECK(row_numbers(read_rows(indices_of({}, 3), Numbers{}, 7)) == Numbers{0, 0, 0});  // no dimension: all is one row
  CHECK(read_rows(indices_of({}, 0), Numbers{5}, 7).entries.empty());
  CHECK(read_rows(indices_of({}, 0), Numbers{0}, 7).length == 7);
}

TEST_CASE("indices are read by their strides") {
  const Numbers numbers = {4, 1, -1, 0, 2, -1, 2, 0, -1};
  const Rows rows = read_rows({.data = numbers.data(), .entries = 3, .strides = {1, 3}}, Numbers{5, 3}, 1);
  CHECK(row_numbers(rows) == Numbers{13, 2, 6});
}

TEST_CASE("an index out of range is named") {
  const auto message = [](const Numbers& numbers, std::int64_t entries, const Numbers& sizes) -> std::string {
    try {
      read_rows(indices_of(numbers, entries), sizes, 1);
    } catch (const std::out_of_range& error) {
      return error.what();
    }
    return "";
  };
  CHECK(message({0, 4}, 2, {5}) == "");
  CHECK(message({0, 5}, 2, {5}) == "index 5 of entry 1 is out of range for dimension 0 of size 5");
  CHECK(message({-1, 4}, 2, {5}) == "index -1 of entry 0 is out of range for dimension 0 of size 5");
  CHECK(message({0, 1, 2, 3}, 2, {5, 3}) == "index 3 of entry 1 is out of range for dimension 1 of size 3");
  CHECK(message({0}, 1, {0}) == "index 0 of entry 0 is out of range for dimension 0 of size 0");
  CHECK(message({INT64_MIN}, 1, {5}).starts_with("index -9223372036854775808 of entry 0"));
}

// The rows of few or many entries, near or far apart.
Numbers some_rows(std::int64_t entries, std::int64_t count) {
  Numbers rows;
  for (std::int64_t e = 0; e < entries; ++e)
    rows.push_back(
        static_cast<std::int64_t>(scramble(static_cast<std::uint64_t>(e) + 77) % static_cast<std::uint64_t>(count)));
  return rows;
}

TEST_CASE("entries are sorted by row, and keep their order within a row") {
  for (const std::int64_t entries : {0, 1, 2, 3, 10, 1000, 5000}) {
    for (const std::int64_t count : {std::int64_t{1}, std::int64_t{2}, std::int64_t{7}, std::int64_t{2048},
                                     std::int64_t{2049}, std::int64_t{1} << 33, INT64_MAX}) {
      for (const bool ascending : {false, true}) {
        CAPTURE(entries);
        CAPTURE(count);
        Numbers numbers = some_rows(entries, count);
        if (ascending) std::ranges::sort(numbers);
        std::map<std::int64_t, Numbers> want;
        for (std::int64_t e = 0; e < entries; ++e) want[numbers[static_cast<std::size_t>(e)]].push_back(e);

        Rows rows = read_rows(indices_of(numbers, entries), Numbers{count}, 1);
        coalesce(rows);
        REQUIRE(rows.count() == std::ssize(want));
        std::size_t e = 0;
        std::size_t r = 0;
        for (const auto& [row, of_row] : want) {
          CHECK(rows.first[r++] == static_cast<std::int64_t>(e));
          for (const std::int64_t position : of_row) {
            CHECK(rows.entries[e].row == row);
            CHECK(rows.entries[e++].position == position);
          }
        }
        CHECK(rows.first[r] == entries);
      }
    }
  }
}

TEST_CASE("coalesced rows do not change") {
  Rows rows = read_rows(indices_of({3, 1, 3}, 3), Numbers{5}, 1);
  coalesce(rows);
  const Rows once = rows;
  coalesce(rows);
  CHECK(row_numbers(rows) == Numbers{1, 3, 3});
  CHECK(positions(rows) == Numbers{1, 0, 2});
  CHECK(rows.first == once.first);
}

// -- steps -----------------------------------------------------------------------------------------------------------

// A parameter and its states, of `shape[0]` rows, and a gradient with an entry for each of these row numbers.
struct SparseProblem {
  Problem whole;     // its gradient is not used
  Problem gradient;  // its parameter is the gradient's values
  Numbers numbers;
};

SparseProblem make_sparse(const Setting& setting, std::int64_t count, std::int64_t length, Numbers numbers,
                          const Spec& spec = {}) {
  Spec values;
  values.formats[kParam] = spec.formats[kGrad];
  values.misalignment = spec.misalignment + 3 * spec.stagger;
  return {make_problem(setting, {count, length}, spec),
          make_problem(setting_of("sgd, plain"), {std::ssize(numbers), length}, values), std::move(numbers)};
}

class BoundSparseJob {
 public:
  explicit BoundSparseJob(SparseProblem& problem) : bound_(problem.whole), job_(bound_.job()) {
    Tensor& values = problem.gradient.tensors[kParam];
    rows_ = read_rows(indices_of(problem.numbers, std::ssize(problem.numbers)), Numbers{problem.whole.shape[0]},
                      problem.whole.shape[1]);
    coalesce(rows_);
    job_.rows = &rows_;
    job_.length = rows_.count() * rows_.length;
    job_.operands[kGrad] = {values.at(0), values.format};
  }
  const Job& job() const { return job_; }

 private:
  BoundJob bound_;
  Rows rows_;
  Job job_;
};

// The step by its definition: each touched row on its own, with the sum of its entries in their order.
template <class T>
[[gnu::noinline]] Problem expected_of(SparseProblem problem) {
  const StepMode mode;
  Problem& whole = problem.whole;
  Tensor& values = problem.gradient.tensors[kParam];
  const std::int64_t length = whole.shape[1];
  std::map<std::int64_t, std::vector<T>> sums;
  for (std::size_t e = 0; e < problem.numbers.size(); ++e) {
    std::vector<T>& sum = sums[problem.numbers[e]];
    const bool first = sum.empty();
    sum.resize(static_cast<std::size_t>(length));
    for (std::int64_t i = 0; i < length; ++i) {
      const T value = load<T>(values, static_cast<std::int64_t>(e) * length + i);
      T& element = sum[static_cast<std::size_t>(i)];
      element = first ? value : element + value;
    }
  }
  Spec spec{.wide = whole.wide, .grad_factor = whole.grad_factor, .followers = whole.followers};
  for (std::size_t k = 0; k < whole.tensors.size(); ++k) spec.formats[k] = whole.tensors[k].format;
  spec.formats[kGrad] = sizeof(T) == 8 ? Format::float64 : Format::float32;
  for (const auto& [row, sum] : sums) {
    Problem one = make_problem(whole.setting, {length}, spec);
    const auto copy = [&](bool back) {
      for (std::size_t k = 0; k < whole.tensors.size(); ++k) {
        if (k == kGrad || !uses(whole, k)) continue;
        const std::size_t bytes = static_cast<std::size_t>(length) * size_of(whole.tensors[k].format);
        std::byte* const there = whole.tensors[k].at(row * length);
        std::byte* const here = one.tensors[k].at(0);
        std::memcpy(back ? there : here, back ? here : there, bytes);
      }
    };
    copy(false);
    for (std::int64_t i = 0; i < length; ++i) store(one.tensors[kGrad], i, sum[static_cast<std::size_t>(i)]);
    one = expected(one);
    copy(true);
  }
  return whole;
}

Problem expected_rows(const SparseProblem& problem) {
  return problem.whole.wide ? expected_of<double>(problem) : expected_of<float>(problem);
}

// The step in pieces of at most this many elements, as several threads would.
void check(const SparseProblem& problem, std::initializer_list<std::int64_t> pieces = {INT64_MAX / 2}) {
  const Problem want = expected_rows(problem);
  for (const Isa& isa : supported_isas()) {
    CAPTURE(std::string_view(isa.name));
    for (const std::int64_t piece : pieces) {
      CAPTURE(piece);
      SparseProblem got = problem;
      {
        const BoundSparseJob bound(got);
        const StepMode mode;
        for (std::int64_t at = 0; at < bound.job().length; at += piece)
          isa.kernels.run(got.whole.setting.rule, bound.job(), at, std::min(bound.job().length, at + piece),
                          active_tuning());
      }
      CHECK(difference(got.whole, want) == "");
      CHECK(difference(got.gradient, problem.gradient) == "");
    }
  }
}

const Numbers kUnsorted = {7, 3, 7, 0, 9, 3, 7};

TEST_CASE("rows of every length, short and long, in every format") {
  for (const std::int64_t length : {1, 2, 3, 5, 16, 17, 63, 64, 65, 100, 1000, 1023, 1024, 1025, 2100}) {
    CAPTURE(length);
    for (const bool wide : {false, true})
      for (const Format format : {Format::float32, Format::float64, Format::bfloat16, Format::float16})
        check(make_sparse(setting_of("sparse_adam"), 10, length, kUnsorted,
                          {.formats = all_of(format), .wide = wide, .grad_factor = -0.5}));
  }
}

TEST_CASE("every setting") {
  for (const Setting& setting : kSettings)
    for (const std::int64_t length : {3, 70}) check(make_sparse(setting, 400, length, some_rows(500, 400)));
}

TEST_CASE("every mix of formats, of short rows and of long ones") {
  constexpr std::array formats{Format::float32, Format::float64, Format::bfloat16, Format::float16};
  for (unsigned mix = 0; mix < 1U << 8; ++mix) {
    Spec spec;
    for (std::size_t k = 0; k < 4; ++k) spec.formats[k] = formats[mix >> (2 * k) & 3U];
    for (const std::int64_t length : {5, 80})
      check(make_sparse(setting_of("sparse_adam"), 60, length, some_rows(50, 60), spec));
  }
}

TEST_CASE("followers of the touched rows") {
  for (const Followers& followers : kFollowers)
    for (const Format format : {Format::float32, Format::bfloat16})
      for (const std::int64_t length : {3, 70})
        check(make_sparse(setting_of("sparse_adam"), 12, length, kUnsorted,
                          {.formats = all_of(format), .followers = followers}),
              {1, 64, 1024});
}

TEST_CASE("any piece of the touched elements") {
  for (const std::int64_t length : {1, 3, 64, 1500})
    check(make_sparse(setting_of("sparse_adam"), 30, length, some_rows(40, 30)), {1, 7, 64, 1024, 1100});
}

TEST_CASE("every misalignment") {
  for (const Format format : {Format::float32, Format::float16})
    for (const std::int64_t length : {3, 70})
      for (std::size_t misalignment = 0; misalignment < 64; ++misalignment)
        for (const std::size_t stagger : {0U, 1U, 4U})
          check(make_sparse(setting_of("lion, decay"), 12, length, kUnsorted,
                            {.formats = all_of(format), .misalignment = misalignment, .stagger = stagger}));
}

TEST_CASE("no entries, no rows, rows of no length") {
  check(make_sparse(setting_of("sparse_adam"), 10, 64, {}));
  check(make_sparse(setting_of("sparse_adam"), 0, 64, {}));
  check(make_sparse(setting_of("sparse_adam"), 10, 0, {3, 1, 3}));
}

TEST_CASE("any number of threads, however unevenly the entries are spread") {
  const Setting& setting = setting_of("sparse_adam");
  Numbers uneven = some_rows(20'000, 3000);
  for (std::size_t e = 0; e < uneven.size(); ++e)
    if (e % 3 != 0) uneven[e] = 5;  // most entries are of one row
  std::vector<SparseProblem> problems;
  problems.push_back(make_sparse(setting, 3000, 70, uneven));
  problems.push_back(make_sparse(setting, 10, 3, {}));
  problems.push_back(make_sparse(setting, 200'000, 3, some_rows(150'000, 200'000)));
  problems.push_back(make_sparse(setting, 2, 300'000, {1, 0, 1}));
  problems.push_back(make_sparse(setting, 1000, 0, {3}));
  problems.push_back(make_sparse(setting, 5000, 64, some_rows(20'000, 5000), {.formats = all_of(Format::bfloat16)}));
  std::vector<Problem> want;
  for (const SparseProblem& problem : problems) want.push_back(expected_rows(problem));
  for (const int threads : {1, 2, 3, 5}) {
    CAPTURE(threads);
    std::vector<SparseProblem> got = problems;
    std::vector<Job> jobs;
    std::deque<BoundSparseJob> bound;
    for (SparseProblem& problem : got) jobs.push_back(bound.emplace_back(problem).job());
    run_step(setting.rule, jobs, threads);
    for (std::size_t i = 0; i < got.size(); ++i) {
      CAPTURE(i);
      CHECK(difference(got[i].whole, want[i]) == "");
      CHECK(difference(got[i].gradient, problems[i].gradient) == "");
    }
  }
}

}  // namespace
}  // namespace onepass::testing
