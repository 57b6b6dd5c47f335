// The argument of a kernel: everything that it needs to know of a step, passed by value.
//
// So nothing about a step is in the GPU's memory, except the tensors: no table can be stale, copied, waited for or
// freed too early, and a captured graph holds what it needs. An argument has at most 32,764 bytes, which is some 500
// tensors of Adam. More tensors take another launch.
#pragma once

#include <cstddef>
#include <cstdint>

#include "job.h"
#include "norm.h"

namespace onepass::cuda {

inline constexpr std::size_t kSmallArgument = 4096;   // faster to copy; enough for some 60 tensors
inline constexpr std::size_t kLargeArgument = 32760;  // the limit of CUDA 12.1 on sm_70 and later, in whole words

inline constexpr int kThreads = 256;  // of a block

// How a row's elements are read and written.
enum class Access : std::uint8_t {
  // Vectors of formats that are known at compile time, all aligned, without followers:
  plain,            // all in the arithmetic type
  bfloat16,         // all in bfloat16; this and the following only in float32 arithmetic
  float16,          // all in float16
  bfloat16_states,  // the states in bfloat16, parameter and gradient in float32
  float32_states,   // the states in float32, parameter and gradient in bfloat16
  // All formats:
  mixed,       // several elements at a time, each operand in its own format, aligned or not
  elements,    // one element at a time, with any strides
  stochastic,  // those that are rounded with random bits: 32 elements at a time (stochastic_kernel.h)
};

// A tensor. Its elements are divided into chunks, each of which is the work of one block. Positions are in the table's
// words.
struct Row {
  std::int64_t length;
  std::uint32_t first_block;
  std::uint32_t formats;    // four bits for each operand but the master
  std::uint16_t pointers;   // position of the addresses of the operands that it has, in their order
  std::uint16_t constants;  // position of the rule's constants, in the table or in the workspace
  std::uint16_t layout;     // position of its layout: dimensions, shape, strides of each operand that it has
  std::uint16_t held;       // the operands that it has: a bit each
  std::uint16_t aligned;    // the operands that can be read as vectors: a bit each
  std::uint8_t phase;       // elements before the first vector
  Access access;
  std::uint8_t maximize;
  std::uint8_t has_layout;
  std::uint8_t zeroes_grad;
  Master master;
};
static_assert(sizeof(Row) == 32);

// The words of a row that is rounded with random bits, which follow the addresses of its operands.
struct StochasticWords {
  std::uint64_t scales[kMaxStates];  // addresses, or 0
  std::uint64_t row_length;          // of Blocks; the number of elements if no state is in blocks
  std::uint64_t rounds;              // the operands of 16 bits that are rounded: a bit each
  std::uint64_t first, seed, param;  // of Rounding
  std::uint64_t step;                // a number, or the address of one if it is counted on the GPU
  std::uint64_t step_format;         // kValue: a number
};

// The words of a row over which a rule has sums, which follow the addresses of its operands and, if it has states in
// blocks, its StochasticWords. Its constants are in the workspace.
struct SumWords {
  std::uint64_t sums;                  // address of the sums of its blocks, each as many doubles as the rule has sums
  std::uint64_t totals;                // of a shard: address of the sums over it
  std::uint64_t scalars[kMaxScalars];  // addresses of the rule's scalars
  std::uint64_t formats;               // four bits for each scalar
};

// The numbers of one parameter, some of which are in the GPU's memory. The constants of its row are made on the GPU,
// and the numbers in its memory are advanced to after the step.
struct Counter {
  std::uint64_t numbers[1 + kMaxScalars];  // the step count and the rule's scalars: addresses, or the bits of values
  std::uint16_t hyper;      // position of its hyperparameters: a word for each, and a word with their formats
  std::uint16_t constants;  // position of the rule's constants in the workspace
  std::uint16_t formats;    // four bits for each number
  std::uint16_t unused;
};
static_assert(sizeof(Counter) == 32);
static_assert(kMaster <= 8 && 1 + kMaxScalars <= 4 && kMaxHyper <= 16);  // so that the bits above suffice

// In place of a format: the number is not an address but the bits of a double.
inline constexpr unsigned kValue = 0xf;

struct Header {
  // Address of constants in the GPU's memory; 0: they are in the table. Of a table whose gradients are measured: of the
  // measures of its blocks, a double each.
  std::uint64_t workspace = 0;
  std::uint64_t grad_scale = 0;  // addresses of GradScaler's two floats, or 0
  std::uint64_t found_inf = 0;
  std::uint64_t clipping = 0;  // address of a DeviceClipping, or 0
  double grad_factor = 1.0;    // factor of gradients, without its sign
  // Gradients are clamped to [-clip_value, clip_value] after their factor: in float64 and float32 arithmetic.
  double clip_value = kNoLimit;
  float narrow_clip_value = static_cast<float>(kNoLimit);
  std::uint32_t only_prepares = 0;    // of a table of counters: constants are made, but no number is advanced
  Follower followers[kMaxFollowers];  // how each follower that a row has is updated
  std::uint32_t rows = 0;
  std::uint32_t blocks = 0;
  std::uint32_t chunk = 0;  // elements of a block
  std::uint32_t words = 0;  // in use
};
static_assert(sizeof(Header) == 104);

// How a step depends on the norm of its gradients, in the GPU's memory: three numbers, which Python reads.
struct DeviceClipping {
  double norm;
  double coefficient;  // of the gradients
  double skips;        // whether the step is skipped, and by what: zero or one of the following
};
inline constexpr double kSkippedByNorm = 1.0;
inline constexpr double kSkippedByScaler = 2.0;

// The argument of the kernel that finds a DeviceClipping.
struct Decision {
  Measure what;
  bool skips_nonfinite;
  std::uint32_t count;       // of the measures
  std::uint64_t measures;    // their address
  std::uint64_t grad_scale;  // addresses of GradScaler's two floats, or 0
  std::uint64_t found_inf;
  std::uint64_t clipping;  // address of the result
  double grad_factor;      // factor of gradients
  double max_norm;
};

// Rows (or counters) first, then the words that they point to. Positions are in words.
template <std::size_t Bytes>
struct Table {
  static constexpr std::size_t kWords = (Bytes - sizeof(Header)) / sizeof(std::uint64_t);
  Header header;
  std::uint64_t words[kWords];
};
using SmallTable = Table<kSmallArgument>;
using LargeTable = Table<kLargeArgument>;
static_assert(sizeof(SmallTable) <= kSmallArgument && sizeof(LargeTable) <= kLargeArgument);

}  // namespace onepass::cuda
