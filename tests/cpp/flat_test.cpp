// The passes of L-BFGS over flat vectors, to the bit: formats, layouts, groups, instruction sets, threads.
#include "cpu/flat.h"

#include <doctest/doctest.h>

#include <cmath>
#include <deque>
#include <limits>
#include <string_view>

#include "cases.h"
#include "cpu/team.h"
#include "reference.h"
#include "sum.h"

namespace onepass::testing {
namespace {

using enum Format;

// -- the reference: every element and every sum by its definition ----------------------------------------------------

// A flat vector with guards; a copy has memory of its own.
Tensor vector(Format format, std::int64_t length, std::uint64_t seed, std::size_t misalignment = 0) {
  Tensor tensor;
  tensor.format = format;
  tensor.strides = {1};
  tensor.first = kGuardBefore + misalignment;
  tensor.memory = Memory(tensor.first + static_cast<std::size_t>(length) * size_of(format) + kGuardAfter);
  for (std::int64_t i = 0; i < length; ++i) store(tensor, i, number(static_cast<std::uint64_t>(i) * 64 + seed));
  return tensor;
}

Operand operand(Tensor& tensor) { return {tensor.at(0), tensor.format}; }

bool same(const Tensor& a, const Tensor& b) {
  return std::memcmp(a.memory.data(), b.memory.data(), b.memory.size()) == 0;
}

bool same(double a, double b) { return std::bit_cast<std::uint64_t>(a) == std::bit_cast<std::uint64_t>(b); }

// Groups of many lengths, some of several chunks, large enough together for several threads.
Flat flat_of(bool wide) { return {{0, 1, 1050, 1050, 17'500, 350'003, 350'004}, wide, 1}; }

struct Setup {
  bool wide;
  Format format;
  std::size_t misalignment;
};
#if defined(__SANITIZE_THREAD__)  // threads share the same in all formats
const Setup kSetups[] = {{false, float32, 0}, {true, float64, 0}};
#else
const Setup kSetups[] = {{false, float32, 0}, {false, float32, 2}, {false, bfloat16, 0},
                         {false, float16, 0}, {true, float64, 0},  {true, bfloat16, 0}};
#endif

// Runs it for every instruction set and several numbers of threads.
template <class Test>
void everywhere(Flat flat, Test&& test) {
  for (const Isa& isa : supported_isas()) {
    CAPTURE(std::string_view(isa.name));
    force_isa(isa.name);
    for (const int threads : {1, 2, 5}) {
      CAPTURE(threads);
      flat.threads = threads;
      test(flat);
    }
  }
  force_isa("");
}

// Calls work(group, element) for all elements in order, in the floating-point mode of a step.
template <class Work>
[[gnu::noinline]] void for_each_element(const Flat& flat, Work&& work) {
  const StepMode mode;
  std::int64_t i = 0;
  for (std::size_t group = 0; group < flat.ends.size(); ++group)
    for (; i < flat.ends[group]; ++i) work(group, i);
}

// -- tensors as parts of the vector ----------------------------------------------------------------------------------

// The tensors of the vector, some of them strided, two of them empty.
struct Tensors {
  std::deque<Tensor> tensors;
  std::deque<Layout> layouts;
  std::vector<Part> parts;
  std::vector<std::pair<std::size_t, std::int64_t>> places;  // tensor and offset of every element

  Tensors(const Flat& flat, Format format, Format other) {
    std::int64_t at = 0;
    const auto add = [&](std::vector<std::int64_t> shape, std::vector<std::int64_t> strides, Format stored) {
      const auto length = std::accumulate(shape.begin(), shape.end(), std::int64_t{1}, std::multiplies<>());
      const std::size_t index = tensors.size();
      std::int64_t extent = 0;
      for_each_index(shape, [&](const auto& at_index) {
        places.emplace_back(index, offset_of(at_index, strides));
        extent = std::max(extent, places.back().second + 1);
      });
      tensors.push_back(vector(stored, extent, 17 + index));
      Part part{.begin = at, .length = length, .tensor = operand(tensors.back()), .layout = nullptr};
      if (strides != packed(shape)) {
        std::array<std::span<const std::int64_t>, kMaxOperands> all;
        const std::vector<std::int64_t> in_order = packed(shape);
        all[Part::kFlat] = in_order;
        all[Part::kTensor] = strides;
        part.layout = &layouts.emplace_back(make_layout(shape, all));
      }
      parts.push_back(part);
      at += length;
    };
    add({0}, {1}, format);
    add({1}, {1}, other);
    add({7, 5}, {1, 7}, format);
    add({2, 0}, {1, 1}, format);
    add({1014}, {3}, format);
    add({16'000}, {1}, other);
    add({6, 5, 15}, {75, 1, 5}, other);
    add({332'000}, {1}, format);
    add({flat.length() - at}, {1}, format);
  }
  Tensors(const Tensors&) = delete;
  Tensors& operator=(const Tensors&) = delete;

  Tensor& tensor(std::int64_t i) { return tensors[places[static_cast<std::size_t>(i)].first]; }
  std::int64_t offset(std::int64_t i) const { return places[static_cast<std::size_t>(i)].second; }
  double value(std::int64_t i) { return load<double>(tensor(i), offset(i)); }
};

TEST_CASE("gather: elements, sums and maxima") {
  for (const Setup& setup : kSetups) {
    const Flat flat = flat_of(setup.wide);
    CAPTURE(std::string_view(name_of(setup.format)));
    CAPTURE(setup.wide);
    Tensors tensors(flat, setup.format, setup.format);
    tensors.parts[5].tensor.data = nullptr;  // zeros
    Tensor direction = vector(setup.format, flat.length(), 5, setup.misalignment);
    const Tensor blank = vector(setup.format, flat.length(), 6, setup.misalignment);

    Tensor want = blank;
    std::vector<Sum> sums(flat.ends.size());
    std::vector<double> largest(flat.ends.size());
    for_each_element(flat, [&](std::size_t group, std::int64_t i) {
      const auto size = size_of(setup.format);
      if (&tensors.tensor(i) == &tensors.tensors[5]) {
        std::memset(want.at(i), 0, size);
      } else {
        std::memcpy(want.at(i), tensors.tensor(i).at(tensors.offset(i)), size);
      }
      const auto value = load<double>(want, i);
      sums[group].add(value * load<double>(direction, i));
      largest[group] = std::max(largest[group], std::fabs(value));
    });

    std::vector<double> totals;
    for (Sum& sum : sums) totals.push_back(sum.total());
    everywhere(flat, [&](const Flat& each) {
      Tensor got = blank;
      const Found found =
          run(each, Gather{.parts = tensors.parts, .out = operand(got), .direction = operand(direction)});
      CHECK(same(got, want));
      for (std::size_t group = 0; group < flat.ends.size(); ++group) {
        CHECK(same(found.sum(group, 0), totals[group]));
        CHECK(found.largest[group] == largest[group]);
      }
    });
  }
}

TEST_CASE("gather: a vector of a wider format than the tensors', and without a direction") {
  const Flat flat = flat_of(false);
  Tensors tensors(flat, bfloat16, float16);
  const Tensor blank = vector(float32, flat.length(), 6);
  Tensor want = blank;
  for_each_element(
      flat, [&](std::size_t, std::int64_t i) { store(want, i, load<float>(tensors.tensor(i), tensors.offset(i))); });
  everywhere(flat, [&](const Flat& each) {
    Tensor got = blank;
    const Found found = run(each, Gather{.parts = tensors.parts, .out = operand(got), .direction = {}});
    CHECK(same(got, want));
    for (std::size_t group = 0; group < flat.ends.size(); ++group) CHECK(found.sum(group, 0) == 0);
  });
}

TEST_CASE("distance: from a vector, and from zero") {
  for (const Setup& setup : kSetups) {
    const Flat flat = flat_of(setup.wide);
    CAPTURE(std::string_view(name_of(setup.format)));
    CAPTURE(setup.wide);
    Tensors tensors(flat, setup.format, setup.format);
    Tensor from = vector(setup.wide ? float64 : float32, flat.length(), 5, setup.misalignment);
    std::vector<Sum> sums(flat.ends.size());
    std::vector<Sum> squares(flat.ends.size());
    for_each_element(flat, [&](std::size_t group, std::int64_t i) {
      const double difference = tensors.value(i) - load<double>(from, i);
      sums[group].add(difference * difference);
      squares[group].add(tensors.value(i) * tensors.value(i));
    });
    std::vector<std::pair<double, double>> totals;
    for (std::size_t group = 0; group < sums.size(); ++group)
      totals.emplace_back(sums[group].total(), squares[group].total());
    everywhere(flat, [&](const Flat& each) {
      const Found found = run(each, Distance{.parts = tensors.parts, .from = operand(from)});
      const Found from_zero = run(each, Distance{.parts = tensors.parts, .from = {}});
      for (std::size_t group = 0; group < flat.ends.size(); ++group) {
        CHECK(same(found.sum(group, 0), totals[group].first));
        CHECK(same(from_zero.sum(group, 0), totals[group].second));
      }
    });
  }
}

TEST_CASE("gather: a value that is not finite is the largest, at every position") {
  constexpr double inf = std::numeric_limits<double>::infinity();
  constexpr double nan = std::numeric_limits<double>::quiet_NaN();
  for (const bool wide : {false, true}) {
    const Flat flat{{40'000, 80'000}, wide, 2};
    const Format format = wide ? float64 : float32;
    for (const std::int64_t at : {0, 1023, 1024, 17'000, 39'999}) {
      Tensor from = vector(format, 80'000, 3);
      Tensor to = from;
      const Part part{.begin = 0, .length = 80'000, .tensor = operand(from), .layout = nullptr};
      const Gather pass{.parts = {&part, 1}, .out = operand(to), .direction = {}};
      store(from, at, -inf);
      CHECK(run(flat, pass).largest[0] == inf);
      store(from, (at + 5) % 40'000, -nan);
      CHECK(std::isnan(run(flat, pass).largest[0]));
      CHECK(run(flat, pass).largest[1] < 3);
    }
  }
}

TEST_CASE("move: there, further, and back to the bit") {
  for (const Setup& setup : kSetups) {
    const Flat flat = flat_of(setup.wide);
    CAPTURE(std::string_view(name_of(setup.format)));
    CAPTURE(setup.wide);
    // With tensors of another format, none of them wider than x.
    const Format other = setup.format == float64 ? bfloat16 : setup.format;
    Tensor direction = vector(setup.format, flat.length(), 5, setup.misalignment);
    Tensors from(flat, setup.format, other);
    const auto moved = [&](double step) {
      std::deque<Tensor> want = from.tensors;
      for_each_element(flat, [&](std::size_t, std::int64_t i) {
        Tensor& target = want[from.places[static_cast<std::size_t>(i)].first];
        if (setup.wide) {
          store(target, from.offset(i), from.value(i) + step * load<double>(direction, i));
        } else {
          const auto x = load<float>(from.tensor(i), from.offset(i));
          store(target, from.offset(i), x + static_cast<float>(step) * load<float>(direction, i));
        }
      });
      return want;
    };
    const std::deque<Tensor> there = moved(0.3);
    const std::deque<Tensor> further = moved(-1.7);
    everywhere(flat, [&](const Flat& each) {
      Tensors got(flat, setup.format, other);
      Tensor x = vector(setup.format, flat.length(), 7);
      Move pass{.parts = got.parts, .x = operand(x), .direction = operand(direction), .step = 0.3, .keep = true};
      const auto check = [&](const std::deque<Tensor>& want) {
        for (std::size_t k = 0; k < want.size(); ++k) CHECK(same(got.tensors[k], want[k]));
      };
      run(each, pass);
      check(there);
      pass.keep = false;
      pass.step = -1.7;
      run(each, pass);
      check(further);
      pass.step = 0.0;
      run(each, pass);
      check(from.tensors);
    });
  }
}

// -- the history -----------------------------------------------------------------------------------------------------

template <class T>
void check_products(const Setup& setup) {
  const Flat flat = flat_of(setup.wide);
  constexpr std::size_t count = 3;
  std::vector<Tensor> s;
  std::vector<Tensor> y;
  for (std::size_t k = 0; k < count; ++k) {
    s.push_back(vector(setup.format, flat.length(), 10 + k, setup.misalignment));
    y.push_back(vector(setup.format, flat.length(), 20 + k, setup.misalignment));
  }
  Tensor gradient = vector(setup.format, flat.length(), 1, setup.misalignment);
  Tensor previous = vector(setup.format, flat.length(), 2, setup.misalignment);
  Tensor direction = vector(setup.format, flat.length(), 3, setup.misalignment);
  constexpr double step = 0.7;

  std::vector<Tensor> want_s = s;
  std::vector<Tensor> want_y = y;
  std::vector<std::array<std::array<Sum, Products::sums>, count>> sums(flat.ends.size());
  for_each_element(flat, [&](std::size_t group, std::int64_t i) {
    const T g = load<T>(gradient, i);
    store<T>(want_s.back(), i, static_cast<T>(step) * load<T>(direction, i));
    store<T>(want_y.back(), i, g - load<T>(previous, i));
    const auto newest = static_cast<double>(load<T>(want_y.back(), i));
    for (std::size_t k = 0; k < count; ++k) {
      const auto of_s = static_cast<double>(load<T>(want_s[k], i));
      const auto of_y = static_cast<double>(load<T>(want_y[k], i));
      sums[group][k][Products::sy].add(of_s * newest);
      sums[group][k][Products::yy].add(of_y * newest);
      sums[group][k][Products::sg].add(of_s * static_cast<double>(g));
      sums[group][k][Products::yg].add(of_y * static_cast<double>(g));
    }
  });
  std::vector<double> totals;
  {
    const StepMode mode;
    for (auto& group : sums)
      for (auto& pair : group)
        for (Sum& sum : pair) totals.push_back(sum.total());
  }
  everywhere(flat, [&](const Flat& each) {
    std::vector<Tensor> got_s = s;
    std::vector<Tensor> got_y = y;
    std::vector<Pair> pairs;
    for (std::size_t k = 0; k < count; ++k) pairs.push_back({operand(got_s[k]), operand(got_y[k])});
    Products pass{.pairs = pairs,
                  .gradient = operand(gradient),
                  .previous = operand(previous),
                  .direction = operand(direction),
                  .step = step};
    for (const bool again : {false, true}) {
      if (again) pass.previous = pass.direction = {};  // the last pair is not written again
      const Found found = run(each, pass);
      REQUIRE(found.sums.size() == totals.size());
      for (std::size_t k = 0; k < totals.size(); ++k) CHECK(same(found.sums[k], totals[k]));
      for (std::size_t k = 0; k < count; ++k) CHECK((same(got_s[k], want_s[k]) && same(got_y[k], want_y[k])));
    }
  });
}

TEST_CASE("products: the new pair, and every sum of every group") {
  for (const Setup& setup : kSetups) {
    CAPTURE(std::string_view(name_of(setup.format)));
    CAPTURE(setup.wide);
    setup.wide ? check_products<double>(setup) : check_products<float>(setup);
  }
}

template <class T>
void check_combine(const Setup& setup, std::size_t count) {
  const Flat flat = flat_of(setup.wide);
  std::vector<Tensor> s;
  std::vector<Tensor> y;
  std::vector<Pair> pairs;
  for (std::size_t k = 0; k < count; ++k) {
    s.push_back(vector(setup.format, flat.length(), 10 + k, setup.misalignment));
    y.push_back(vector(setup.format, flat.length(), 20 + k, setup.misalignment));
  }
  for (std::size_t k = 0; k < count; ++k) pairs.push_back({operand(s[k]), operand(y[k])});
  Tensor gradient = vector(setup.format, flat.length(), 1, setup.misalignment);
  std::vector<Combine::Factors> factors;
  for (std::size_t group = 0; group < flat.ends.size(); ++group) {
    Combine::Factors& own = factors.emplace_back();
    own.of_gradient = -1.0 / static_cast<double>(group + 3);
    for (std::size_t k = 0; k < count; ++k) {
      own.of_s.push_back(0.1 * static_cast<double>(k + group));
      own.of_y.push_back(-0.3 * static_cast<double>(k) + 0.01 * static_cast<double>(group));
    }
  }

  const Tensor blank = vector(setup.format, flat.length(), 2, setup.misalignment);
  Tensor want = blank;
  std::vector<std::array<Sum, Combine::sums>> sums(flat.ends.size());
  std::vector<double> largest(flat.ends.size());
  for_each_element(flat, [&](std::size_t group, std::int64_t i) {
    const auto g = static_cast<double>(load<T>(gradient, i));
    double total = factors[group].of_gradient * g;
    for (std::size_t k = 0; k < count; ++k) {
      total += factors[group].of_s[k] * static_cast<double>(load<T>(s[k], i));
      total += factors[group].of_y[k] * static_cast<double>(load<T>(y[k], i));
    }
    store<T>(want, i, static_cast<T>(total));
    const auto out = static_cast<double>(load<T>(want, i));
    sums[group][0].add(out * g);
    sums[group][1].add(std::fabs(out));
    largest[group] = std::max(largest[group], std::fabs(out));
  });
  std::vector<double> totals;
  {
    const StepMode mode;
    for (auto& group : sums)
      for (Sum& sum : group) totals.push_back(sum.total());
  }
  everywhere(flat, [&](const Flat& each) {
    Tensor got = blank;
    const Found found =
        run(each, Combine{.pairs = pairs, .factors = factors, .gradient = operand(gradient), .out = operand(got)});
    CHECK(same(got, want));
    for (std::size_t k = 0; k < totals.size(); ++k) CHECK(same(found.sums[k], totals[k]));
    CHECK(found.largest == largest);
  });
}

TEST_CASE("combine: elements, sums and maxima") {
  for (const Setup& setup : kSetups) {
    CAPTURE(std::string_view(name_of(setup.format)));
    CAPTURE(setup.wide);
    for (const std::size_t count : {0U, 1U, 4U})
      setup.wide ? check_combine<double>(setup, count) : check_combine<float>(setup, count);
  }
}

TEST_CASE("an empty vector, and no groups") {
  for (const Flat& flat : {Flat{{}, false, 5}, Flat{{0, 0}, true, 5}}) {
    const Found found = run(flat, Gather{});
    CHECK(found.largest == std::vector<double>(flat.ends.size()));
    CHECK(found.sums == std::vector<double>(flat.ends.size()));
  }
}

TEST_CASE("the number of threads depends on the bytes") {
  constexpr std::int64_t mib = std::int64_t{1} << 20;
  CHECK(team_size(0, 8) == 1);
  CHECK(team_size(4 * mib - 1, 8) == 1);
  CHECK(team_size(4 * mib, 8) == 2);
  CHECK(team_size(1000 * mib, 8) == 8);
  CHECK(team_size(1000 * mib, 0) == 1);
}

}  // namespace
}  // namespace onepass::testing
