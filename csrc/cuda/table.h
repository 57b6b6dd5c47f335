// What travels to the GPU with a launch: all that a kernel needs to know of a step, by value, as its argument.
//
// So nothing about a step lies in the GPU's memory, except the tensors themselves: no table is ever stale, copied,
// waited for or freed too early, and a captured graph holds what it needs. An argument has room for 32,764 bytes, which
// is some 500 tensors of Adam; what does not fit goes with another launch.
#pragma once

#include <cstddef>
#include <cstdint>

#include "job.h"

namespace onepass::cuda {

inline constexpr std::size_t kSmallArgument = 4096;   // copied in no time; enough for some 60 tensors
inline constexpr std::size_t kLargeArgument = 32760;  // the limit of CUDA 12.1 on sm_70 and later, in whole words

inline constexpr int kThreads = 256;  // of a block

// Which way a row's elements are read and written.
enum class Access : std::uint8_t {
  // Vectors of formats that are known when the kernel is compiled, all of them aligned, without followers:
  plain,            // all in the arithmetic type
  bfloat16,         // all in bfloat16; this and the following in float32 arithmetic alone
  float16,          // all in float16
  bfloat16_states,  // the states in bfloat16, parameter and gradient in float32
  float32_states,   // the states in float32, parameter and gradient in bfloat16
  // And of any:
  mixed,     // several elements at a time, each operand in its own format, aligned or not
  elements,  // one element at a time, wherever it lies
};

// A tensor. Its elements are divided into chunks, each of which is the work of one block. Positions are in the table's
// words.
struct Row {
  std::int64_t length;
  std::uint32_t first_block;
  std::uint32_t formats;    // four bits for each operand
  std::uint16_t pointers;   // where those of the operands that it has begin, in their order
  std::uint16_t constants;  // where the rule's constants begin, of the table or of the workspace
  std::uint16_t layout;     // where its layout begins: dimensions, shape, strides of each operand that it has
  std::uint8_t held;        // which operands it has: a bit each
  std::uint8_t aligned;     // which of them can be read as vectors
  std::uint8_t phase;       // elements before the first vector
  Access access;
  std::uint8_t maximize;
  std::uint8_t has_layout;
  std::uint8_t unused[4];
};
static_assert(sizeof(Row) == 32);

// The numbers of one parameter, of which some lie in the GPU's memory: the constants of its row are made there, and the
// numbers that lie there are brought to after the step.
struct Counter {
  std::uint64_t numbers[1 + kMaxScalars];  // the steps made and the rule's scalars: addresses, or the values' bits
  std::uint16_t hyper;      // where its hyperparameters begin: as many of the same, and a word with their formats
  std::uint16_t constants;  // where the rule's constants go in the workspace
  std::uint16_t formats;    // four bits for each number
  std::uint16_t unused;
};
static_assert(sizeof(Counter) == 32);
static_assert(kMaxOperands <= 8 && 1 + kMaxScalars <= 4 && kMaxHyper <= 16);  // the bits that each has a share of

// In the place of a format: the number is not an address but the value of a double.
inline constexpr unsigned kValue = 0xf;

struct Header {
  std::uint64_t workspace = 0;   // address of constants in the GPU's memory; 0: they are in the table
  std::uint64_t grad_scale = 0;  // addresses of GradScaler's two floats, or 0
  std::uint64_t found_inf = 0;
  double grad_factor = 1.0;           // what gradients are multiplied by, but for the sign
  Follower followers[kMaxFollowers];  // what happens to each follower that a row has
  std::uint32_t rows = 0;
  std::uint32_t blocks = 0;
  std::uint32_t chunk = 0;  // elements of a block
  std::uint32_t words = 0;  // in use
};
static_assert(sizeof(Header) == 80);

// Rows (or counters) first, then whatever they point to. Positions count words.
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
