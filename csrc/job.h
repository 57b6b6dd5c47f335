// What a step works on: one job for each tensor, in terms of raw memory.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "formats/format.h"
#include "rules/registry.h"

namespace onepass {

// The operands of a rule, in this order: parameter, gradient, states. After them, of whatever rule, Lookahead's slow
// weights.
inline constexpr std::size_t kParam = 0;
inline constexpr std::size_t kGrad = 1;
inline constexpr std::size_t kFirstState = 2;
inline constexpr std::size_t kSlow = kFirstState + kMaxStates;
inline constexpr std::size_t kMaxOperands = kSlow + 1;

struct Operand {
  std::byte* data = nullptr;  // null: this step does not use this operand
  Format format = Format::float32;
};

// Where the elements lie when not all operands are packed in the same order. Strides are in elements.
struct Layout {
  std::vector<std::int64_t> shape;
  std::array<std::vector<std::int64_t>, kMaxOperands> strides;
};

struct Rows;

struct Job {
  std::int64_t length = 0;          // elements
  const Layout* layout = nullptr;   // null: element i of every operand lies at data + i * size
  const Rows* rows = nullptr;       // null: all of the tensor; else these rows of parameter and states, row-major
  const void* constants = nullptr;  // the rule's `Constants<float>`, or `Constants<double>` if wide
  double grad_factor = 1.0;         // what gradients are multiplied by: 1 / loss scale, negative to maximize
  double blend = 0.0;               // where there are slow weights: how far they go towards the parameter, 0 to 1
  bool wide = false;                // arithmetic in float64 rather than float32
  std::array<Operand, kMaxOperands> operands;

  std::int64_t bytes_per_element() const {
    std::int64_t bytes = 0;
    for (const Operand& operand : operands)
      if (operand.data != nullptr) bytes += static_cast<std::int64_t>(size_of(operand.format));
    return bytes;
  }
};

}  // namespace onepass
