// Layouts: what make_layout merges and how it orders dimensions, and the properties of a tensor's strides.
#include "layout.h"

#include <doctest/doctest.h>

#include <algorithm>
#include <set>
#include <string_view>
#include <vector>

namespace onepass {
namespace {

using Ints = std::vector<std::int64_t>;

Layout layout_of(const Ints& shape, const std::vector<Ints>& strides) {
  std::array<std::span<const std::int64_t>, kMaxOperands> spans;
  for (std::size_t k = 0; k < strides.size(); ++k) spans[k] = strides[k];
  return make_layout(shape, spans);
}

// The offset of each element in each operand: one row for each element, in no order.
std::multiset<Ints> places(const Ints& shape, const std::vector<Ints>& strides) {
  std::multiset<Ints> rows{Ints(strides.size(), 0)};
  for (std::size_t d = 0; d < shape.size(); ++d) {
    std::multiset<Ints> longer;
    for (const Ints& row : rows) {
      for (std::int64_t i = 0; i < shape[d]; ++i) {
        Ints moved = row;
        for (std::size_t k = 0; k < strides.size(); ++k) moved[k] += i * strides[k][d];
        longer.insert(moved);
      }
    }
    rows = longer;
  }
  return rows;
}

struct Merge {
  std::string_view what;
  Ints shape;
  std::vector<Ints> strides;  // of parameter, gradient, ...
  Ints want_shape;
  std::vector<Ints> want_strides;
  bool flat;
};

const Merge kMerges[] = {
    {"scalar", {}, {{}, {}}, {}, {{}, {}}, true},
    {"sizes of 1, whatever their strides", {1, 1}, {{7, 0}, {1, 1}}, {}, {{}, {}}, true},
    {"packed", {2, 3, 4}, {{12, 4, 1}, {12, 4, 1}}, {24}, {{1}, {1}}, true},
    {"transposed alike", {3, 2}, {{1, 3}, {1, 3}}, {6}, {{1}, {1}}, true},
    {"channels last, all of them", {2, 3, 4, 5}, {{60, 1, 15, 3}, {60, 1, 15, 3}}, {120}, {{1}, {1}}, true},
    {"sizes of 1 are dropped", {4, 1, 5}, {{5, 99, 1}, {5, 5, 1}}, {20}, {{1}, {1}}, true},
    {"a transposed gradient", {2, 3}, {{3, 1}, {1, 2}}, {2, 3}, {{3, 1}, {1, 2}}, false},
    {"a transposed parameter leads", {3, 2}, {{1, 3}, {2, 1}}, {2, 3}, {{3, 1}, {1, 2}}, false},
    {"two of three merge", {2, 3, 4}, {{12, 4, 1}, {4, 8, 1}}, {2, 3, 4}, {{12, 4, 1}, {4, 8, 1}}, false},
    {"an outer and an inner pair", {2, 3, 4, 5}, {{60, 20, 5, 1}, {3, 1, 30, 6}}, {6, 20}, {{20, 1}, {1, 6}}, false},
    {"every second element", {5}, {{2}, {1}}, {5}, {{2}, {1}}, false},
    {"columns of a matrix", {4, 3}, {{7, 1}, {3, 1}}, {4, 3}, {{7, 1}, {3, 1}}, false},
    {"rows of a matrix", {4, 3}, {{3, 1}, {3, 1}}, {12}, {{1}, {1}}, true},
    {"a gradient of one number", {4, 3}, {{3, 1}, {0, 0}}, {12}, {{1}, {0}}, false},
    {"a gradient of one row", {4, 3}, {{3, 1}, {0, 1}}, {4, 3}, {{3, 1}, {0, 1}}, false},
    {"empty", {4, 0, 3}, {{3, 3, 1}, {3, 3, 1}}, {}, {}, true},
    {"an absent operand", {2, 3}, {{3, 1}, {3, 1}, {}, {3, 1}}, {6}, {{1}, {1}, {}, {1}}, true},
    {"absent, and one that does not merge", {2, 3}, {{3, 1}, {1, 2}, {}}, {2, 3}, {{3, 1}, {1, 2}, {}}, false},
    {"only a state differs", {2, 3}, {{3, 1}, {3, 1}, {1, 2}}, {2, 3}, {{3, 1}, {3, 1}, {1, 2}}, false},
};

TEST_CASE("make_layout and is_flat") {
  for (const Merge& row : kMerges) {
    CAPTURE(row.what);
    const Layout layout = layout_of(row.shape, row.strides);
    CHECK(is_flat(layout) == row.flat);
    if (std::ranges::find(row.shape, 0) != row.shape.end()) continue;  // strides of an empty tensor have no meaning
    CHECK(layout.shape == row.want_shape);
    for (std::size_t k = 0; k < row.want_strides.size(); ++k) CHECK(layout.strides[k] == row.want_strides[k]);
    for (std::size_t k = row.want_strides.size(); k < kMaxOperands; ++k) CHECK(layout.strides[k].empty());
  }
}

// Whatever is ordered and merged, the elements of parameter and gradient form the same pairs.
TEST_CASE("a layout has the elements of the strides that it was made from") {
  const Ints shape = {2, 3, 1, 4};
  Ints order = {0, 1, 2, 3};
  const auto strides_in = [&](const Ints& dims, std::int64_t step) {
    Ints strides(shape.size());
    for (std::size_t i = dims.size(); i-- > 0; step *= shape[static_cast<std::size_t>(dims[i])])
      strides[static_cast<std::size_t>(dims[i])] = step;
    return strides;
  };
  std::vector<Ints> all;
  do {
    all.push_back(strides_in(order, 1));
    all.push_back(strides_in(order, 2));
  } while (std::ranges::next_permutation(order).found);
  for (const Ints& param : all) {
    for (const Ints& grad : all) {
      const Layout layout = layout_of(shape, {param, grad});
      CHECK(places(layout.shape, {layout.strides[0], layout.strides[1]}) == places(shape, {param, grad}));
    }
  }
}

TEST_CASE("self_overlap") {
  struct {
    std::string_view what;
    Ints shape, strides;
    Overlap want;
  } const table[] = {
      {"scalar", {}, {}, Overlap::none},
      {"packed", {2, 3}, {3, 1}, Overlap::none},
      {"transposed", {3, 2}, {1, 3}, Overlap::none},
      {"sliced", {4, 3}, {7, 2}, Overlap::none},
      {"empty", {0, 3}, {0, 0}, Overlap::none},
      {"expanded", {4, 3}, {0, 1}, Overlap::certain},
      {"expanded to a size of 1", {1, 3}, {0, 1}, Overlap::none},
      {"one number", {4}, {0}, Overlap::certain},
      {"windows that overlap", {4, 3}, {1, 1}, Overlap::possible},
      {"windows that touch", {2, 3}, {3, 1}, Overlap::none},
      {"interleaved, and yet apart", {3, 2}, {2, 3}, Overlap::possible},
  };
  for (const auto& row : table) {
    CAPTURE(row.what);
    CHECK(self_overlap(row.shape, row.strides) == row.want);
  }
}

TEST_CASE("self_overlap and extent against a count, for every small tensor") {
  for (std::int64_t code = 0; code < 4 * 4 * 3 * 7 * 7 * 7; ++code) {
    std::int64_t rest = code;
    const auto digit = [&](std::int64_t base) {
      const std::int64_t value = rest % base;
      rest /= base;
      return value;
    };
    const Ints shape = {digit(4), digit(4), 1 + digit(3)};
    const Ints strides = {digit(7), digit(7), digit(7)};
    CAPTURE(code);
    const std::multiset<Ints> all = places(shape, {strides});
    const bool shares = std::set<Ints>(all.begin(), all.end()).size() != all.size();
    const Overlap overlap = self_overlap(shape, strides);
    CHECK(!(overlap == Overlap::none && shares));
    CHECK(!(overlap == Overlap::certain && !shares));
    CHECK(extent(shape, strides) == (all.empty() ? 0 : all.rbegin()->front() + 1));
  }
}

}  // namespace
}  // namespace onepass
