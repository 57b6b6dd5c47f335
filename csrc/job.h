// Jobs: one tensor's share of a step, as raw memory.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <vector>

#include "formats/format.h"
#include "rules/registry.h"

namespace onepass {

// The operands of a job: those of its rule (parameter, gradient, states), then the followers, then the master.
inline constexpr std::size_t kParam = 0;
inline constexpr std::size_t kGrad = 1;
inline constexpr std::size_t kFirstState = 2;
inline constexpr std::size_t kMaxFollowers = 2;
inline constexpr std::size_t kFirstFollower = kFirstState + kMaxStates;
inline constexpr std::size_t kMaster = kFirstFollower + kMaxFollowers;
inline constexpr std::size_t kMaxOperands = kMaster + 1;
// And, behind these, states of CAME beyond kMaxStates.
inline constexpr std::size_t kMoreStates = 2;
inline constexpr std::size_t kAllOperands = kMaxOperands + kMoreStates;

// Returns the operand of a rule's state.
constexpr std::size_t operand_of_state(std::size_t state) {
  return state < kMaxStates ? kFirstState + state : kMaxOperands + (state - kMaxStates);
}

struct Operand {
  std::byte* data = nullptr;        // null: this step does not use this operand, or it has no elements
  Format format = Format::float32;  // of an operand that is not used: float32
};

// A follower f is updated after the rule: f += weight * (p - f), where p is the new parameter, and then, with
// sets_param, p = f. With weight 1 it is a copy, f = p. For a follower without sets_param, p is rounded to the
// parameter's format, as torch operations after the step would read it.
struct Follower {
  double weight = 0.0;
  bool sets_param = false;
  bool operator==(const Follower&) const = default;
};

// What a 16-bit parameter has beside it, so that it is stepped in float32 without loss (cpu/master.h). The rule and the
// followers see the master in place of the parameter.
enum class Master : std::uint8_t {
  none,
  whole,     // a float32 master; the parameter is its rounded copy
  low_bits,  // the low 16 bits of a float32 master, whose high bits are those of a bfloat16 parameter, rounded
};

// Shape and strides, in elements, of operands that are not all packed in the same order.
struct Layout {
  std::vector<std::int64_t> shape;
  std::array<std::vector<std::int64_t>, kMaxOperands> strides;
};

// The states that are stored in blocks (formats/microscaling.h). Their codes are operands, which are packed in one
// order, with the first dimension outermost; that is also the order of a job's elements. Blocks begin anew in each row
// of the first dimension. Scales are packed.
struct Blocks {
  std::array<std::byte*, kMaxStates> scales{};  // null: that state is not in blocks
  std::array<Coding, kMaxStates> codings{};
  std::int64_t row_length = 0;  // elements; 0: no state is in blocks

  // Returns the last position up to `at` at which a block begins.
  std::int64_t block_begin(std::int64_t at) const { return at - at % row_length % kBlockLength; }
};

// The random bits with which a step rounds (formats/stochastic.h): states in blocks, and with `stochastic` also a
// parameter without a master, and states, that have 16 bits.
struct Rounding {
  bool stochastic = false;
  std::int64_t first = 0;  // index of the job's first element in the whole tensor, if the job is a shard
  std::uint64_t key = 0;   // made of the following
  std::uint64_t seed = 0, step = 0, param = 0;
};

struct Rows;

inline constexpr double kNoLimit = std::numeric_limits<double>::infinity();

struct Job {
  std::int64_t length = 0;          // elements
  const Layout* layout = nullptr;   // null: element i of every operand lies at data + i * size
  const Rows* rows = nullptr;       // null: the whole tensor; else these rows of parameter and states, row-major
  const void* constants = nullptr;  // the rule's `Constants<float>`, or `Constants<double>` if wide
  double grad_factor = 1.0;         // factor of gradients: 1 / loss scale, negative to maximize
  double clip_value = kNoLimit;     // gradients are clamped to [-clip_value, clip_value], after grad_factor
  bool zeroes_grad = false;         // the gradient is overwritten with zeros
  bool wide = false;                // arithmetic in float64 rather than float32
  std::array<Operand, kAllOperands> operands;
  // Follower i is operand kFirstFollower + i, absent where that has no data. They are updated in this order.
  std::array<Follower, kMaxFollowers> followers{};
  Master master = Master::none;  // operand kMaster; the format of low bits is any of 16 bits, for their size only
  Blocks blocks;
  Rounding rounding;
  bool takes_sums = false;    // the update, or the scalars after it, depend on sums over the whole tensor
  std::int64_t whole = 0;     // elements of the tensor of which the job is a shard, if takes_sums; 0: it is no shard
  double* scalars = nullptr;  // where a rule whose scalars depend on sums writes their values after the step

  // Whether the step rounds an operand of 16 bits stochastically.
  bool rounds(std::size_t operand) const {
    const bool is_rounded = operand == kParam ? master == Master::none : operand != kGrad && operand < kFirstFollower;
    return rounding.stochastic && is_rounded && size_of(operands[operand].format) == 2;
  }

  // Returns clip_value in the type of the arithmetic. A larger one than its numbers limits nothing.
  template <class T>
  T clip_value_as() const {
    return clip_value > double{std::numeric_limits<T>::max()} ? std::numeric_limits<T>::infinity()
                                                              : static_cast<T>(clip_value);
  }

  std::int64_t bytes_per_element() const {
    std::int64_t bytes = 0;
    for (const Operand& operand : operands)
      if (operand.data != nullptr) bytes += static_cast<std::int64_t>(size_of(operand.format));
    return bytes;
  }

  std::int64_t bytes() const { return length * bytes_per_element(); }
};

}  // namespace onepass
