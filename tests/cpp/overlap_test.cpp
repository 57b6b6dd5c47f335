// Overlaps of strided memory, against the sets of the tensors' bytes.
#include "overlap.h"

#include <doctest/doctest.h>

#include <algorithm>
#include <random>
#include <set>
#include <string_view>
#include <vector>

#include "layout.h"

namespace onepass {
namespace {

using Ints = std::vector<std::int64_t>;

std::byte memory[4096];

struct Tensor {
  std::int64_t offset;  // in elements
  Ints shape, strides;
  std::size_t element = 4;

  std::set<std::int64_t> bytes() const {
    std::set<std::int64_t> places{offset};
    for (std::size_t d = 0; d < shape.size(); ++d) {
      std::set<std::int64_t> more;
      for (const std::int64_t place : places)
        for (std::int64_t i = 0; i < shape[d]; ++i) more.insert(place + i * strides[d]);
      places = more;
    }
    std::set<std::int64_t> all;
    for (const std::int64_t place : places)
      for (std::size_t b = 0; b < element; ++b) all.insert(place * std::int64_t(element) + std::int64_t(b));
    return all;
  }

  MemoryRange range(const Spacing* spacing, std::size_t owner = 0) const {
    const auto size = static_cast<std::int64_t>(element);
    std::byte* const first = memory + offset * size;
    return {.first = first, .past = first + extent(shape, strides) * size, .owner = owner, .spacing = spacing};
  }
};

bool share_bytes(const Tensor& a, const Tensor& b) {
  const auto of_a = a.bytes();
  const auto of_b = b.bytes();
  return std::ranges::any_of(of_a, [&](std::int64_t byte) { return of_b.contains(byte); });
}

bool found(const Tensor& a, const Tensor& b) {
  const Spacing of_a = spacing_of(a.shape, a.strides, a.element);
  const Spacing of_b = spacing_of(b.shape, b.strides, b.element);
  const bool found = overlap(a.range(&of_a), b.range(&of_b));
  CHECK_EQ(overlap(b.range(&of_b), a.range(&of_a)), found);
  return found;
}

struct Pair {
  std::string_view what;
  Tensor a, b;
};

const Pair kApart[] = {
    {"columns of a matrix", {0, {5}, {6}}, {1, {5}, {6}}},
    {"the first and the last column", {5, {5}, {6}}, {0, {5}, {6}}},
    {"halves of the rows", {0, {4, 3}, {6, 1}}, {3, {4, 3}, {6, 1}}},
    {"unequal parts of the rows, transposed", {0, {2, 4}, {1, 6}}, {2, {4, 4}, {6, 1}}},
    {"even and odd", {0, {6}, {2}}, {1, {6}, {2}}},
    {"different strides with a common divisor", {0, {6}, {4}}, {1, {5}, {6}}},
    {"blocks within blocks", {0, {3, 2, 2}, {16, 4, 1}}, {2, {3, 2, 2}, {16, 4, 1}}},
    {"one row of blocks, a column of another", {0, {3, 2}, {16, 1}}, {4, {3, 2, 2}, {16, 4, 1}}},
    {"a run within a gap", {0, {2, 2}, {20, 1}}, {5, {9}, {1}}},
    {"elements of two sizes", {0, {4}, {4}, 4}, {4, {8}, {8}, 2}},
};

TEST_CASE("tensors in each other's gaps do not overlap") {
  for (const Pair& pair : kApart) {
    CAPTURE(pair.what);
    REQUIRE_FALSE(share_bytes(pair.a, pair.b));
    CHECK_FALSE(found(pair.a, pair.b));
  }
}

TEST_CASE("every overlap of two tensors is found") {
  std::mt19937 random(7);
  const auto draw = [&](int low, int high) { return std::uniform_int_distribution<std::int64_t>(low, high)(random); };
  int shared = 0;
  int apart = 0;
  int found_apart = 0;
  for (int round = 0; round < 20000; ++round) {
    const auto tensor = [&] {
      Tensor drawn{.offset = draw(0, 24), .shape = {}, .strides = {}, .element = std::size_t(2) << draw(0, 1)};
      for (std::int64_t d = draw(0, 3); d > 0; --d) {
        drawn.shape.push_back(draw(1, 4));
        drawn.strides.push_back(draw(0, 12));
      }
      return drawn;
    };
    const Tensor a = tensor();
    const Tensor b = tensor();
    if (share_bytes(a, b)) {
      ++shared;
      CHECK(found(a, b));
    } else {
      ++apart;
      found_apart += found(a, b) ? 0 : 1;
    }
  }
  CHECK_GT(shared, 5000);
  CHECK_GT(found_apart, apart / 2);
}

TEST_CASE("all overlaps of many ranges") {
  // Rows of a matrix of 8 columns, two of its columns, and one element.
  const std::vector<Tensor> tensors{{0, {8}, {1}}, {16, {8}, {1}}, {0, {4}, {8}},
                                    {1, {4}, {8}}, {17, {}, {}},   {40, {0}, {1}}};
  std::vector<Spacing> spacings;
  spacings.reserve(tensors.size());
  std::vector<MemoryRange> ranges;
  for (const Tensor& tensor : tensors) {
    spacings.push_back(spacing_of(tensor.shape, tensor.strides, tensor.element));
    ranges.push_back(
        tensor.range(tensor.shape.size() == 1 && tensor.strides[0] > 1 ? &spacings.back() : nullptr, ranges.size()));
  }
  std::set<std::set<std::size_t>> pairs;
  for (const auto& [later, earlier] : find_overlaps(ranges)) pairs.insert({later, earlier});
  std::set<std::set<std::size_t>> expected;
  for (std::size_t i = 0; i < tensors.size(); ++i)
    for (std::size_t j = 0; j < i; ++j)
      if (tensors[j].shape != Ints{0} && tensors[i].shape != Ints{0} && share_bytes(tensors[i], tensors[j]))
        expected.insert({i, j});
  CHECK_EQ(pairs.size(), 6);
  CHECK(pairs == expected);
}

}  // namespace
}  // namespace onepass
