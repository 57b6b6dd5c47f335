// The kernel for rows that are rounded with random bits, which are states in blocks (formats/microscaling.h), and
// parameters and states of 16 bits (formats/stochastic.h): the work of one thread. A kernel of its own, because the
// others have no registers to spare.
//
// Eight neighbouring threads step a block of 32 elements, four each. For states in blocks they exchange the largest
// magnitudes of the new states, choose the scale, and encode. On the CPU, where threads run one after the other, the
// first of the eight does the work of all.
#pragma once

#include "cuda/kernel.h"
#include "formats/microscaling.h"
#include "formats/stochastic.h"

namespace onepass::inline ONEPASS_TARGET {

using cuda::StochasticWords;

inline constexpr int kLanes = 8;                    // threads of a block of elements
inline constexpr int kOwn = kBlockLength / kLanes;  // elements of each
static_assert(kOwn == kWidth<float>);

#ifdef __CUDA_ARCH__
inline constexpr int kPlayed = 1;  // lanes whose work a thread does
#else
inline constexpr int kPlayed = kLanes;
#endif

// Returns how many of a block's elements are the share of a lane. `rest`: the elements from the block's first on.
ONEPASS_INLINE int count_of_lane(std::int64_t rest, int lane) {
  const std::int64_t own = rest - lane * kOwn;
  return own < 0 ? 0 : own > kOwn ? kOwn : static_cast<int>(own);
}

// Returns the largest value of the eight threads of a block.
ONEPASS_INLINE std::uint32_t largest_of_lanes(std::uint32_t own) {
#ifdef __CUDA_ARCH__
  const unsigned lanes = 0xffU << (threadIdx.x % 32 / kLanes * kLanes);
#pragma unroll
  for (int distance = kLanes / 2; distance > 0; distance /= 2) {
    const std::uint32_t other = __shfl_xor_sync(lanes, own, distance);
    own = other > own ? other : own;
  }
#endif
  return own;
}

template <class Rule>
constexpr bool has_codings = requires { Rule::state_codings; };

template <class Rule>
constexpr Coding coding_of(std::size_t state) {
  if constexpr (has_codings<Rule>) return Rule::state_codings[state];
  return Coding::none;
}

template <class Rule>
struct StochasticStepper {
  const Stepper<Rule, float>& stepper;
  const StochasticWords& words;
  const std::uint64_t* layout;
  std::uint64_t key;
  bool vectors;  // operands that are not in blocks are read and written as vectors

  static constexpr int kStates = static_cast<int>(Rule::state_names.size());

  ONEPASS_INLINE bool in_blocks(int state) const { return words.scales[state] != 0; }

  // The values of one thread: its elements of all operands.
  using Values = float[kOperands<Rule>][kOwn];

  // Calls visit(k, i, offset) for each of `count` elements from position `at` on of the operands that have single
  // elements. The master is operand kMasterSlot. Not unrolled, because this is the way for strides and the like.
  template <class Visit>
  ONEPASS_INLINE void for_each_element(std::int64_t at, int count, Visit&& visit) const {
#pragma unroll 1
    for (int i = 0; i < count; ++i) {
      std::int64_t offsets[kOperands<Rule> + 1];
      find_offsets(layout, at + i, [&](int k) { return stepper.has(k); }, offsets);
#pragma unroll
      for (int k = 0; k <= kOperands<Rule>; ++k)
        if (stepper.has(k) && !is_codes(k)) visit(k, i, offsets[k]);
    }
  }

  // Get and set an element without an index at run time, which would move the array from registers to memory.
  ONEPASS_INLINE static float get(const float (&own)[kOwn], int i) {
    float value = own[0];
#pragma unroll
    for (int j = 1; j < kOwn; ++j)
      if (i == j) value = own[j];
    return value;
  }
  ONEPASS_INLINE static void set(float (&own)[kOwn], int i, float value) {
#pragma unroll
    for (int j = 0; j < kOwn; ++j)
      if (i == j) own[j] = value;
  }

  ONEPASS_INLINE bool is_codes(int k) const {
    if constexpr (kStates > 0) {
      const int state = k - static_cast<int>(kFirstState);
      return state >= 0 && state < kStates && in_blocks(state);
    }
    return false;
  }

  ONEPASS_INLINE void load(std::int64_t at, std::int64_t block, int count, Values& values) const {
    const Row& row = stepper.row;
    if (is_by_vectors(count)) {
#pragma unroll
      for (int k = 0; k < kRuleOperands<Rule>; ++k) {
        if (!stepper.has(k) || is_codes(k)) continue;
        const Format format = format_of(row, k);
        const std::size_t bytes = size_of(format);
        decode(format, onepass::load<float>(stepper.data[k] + static_cast<std::uint64_t>(at) * bytes, bytes, true),
               values[k]);
      }
    } else {
      for_each_element(at, count, [&](int k, int i, std::int64_t offset) {
        if (k != kMasterSlot<Rule>)
          set(values[k], i, load_element<float>(format_of(row, operand_of<Rule>(k)), stepper.data[k], offset));
      });
    }
    visit_states([&]<std::size_t state>(std::integral_constant<std::size_t, state>) {
      constexpr Coding coding = coding_of<Rule>(state);
      constexpr int k = static_cast<int>(kFirstState + state);
      const std::uint32_t scale = at_address<const std::uint8_t>(words.scales[state])[block];
      const auto factor = decoding_factor<float>(scale);
      const auto* codes = at_address<const std::uint8_t>(stepper.data[k]) + at;
#pragma unroll
      for (int i = 0; i < kOwn; ++i)
        if (i < count) values[k][i] = state_value<coding>(decode_e4m3(codes[i]), factor);
    });
    if (stepper.has_master())
      for_each_element(at, count, [&](int k, int i, std::int64_t offset) {
        if (k != kMasterSlot<Rule>) return;
        float param = get(values[kParam], i);
        stepper.join_element(offset, param);
        set(values[kParam], i, param);
      });
  }

  // Writes the operands that have single elements.
  ONEPASS_INLINE void store(std::int64_t at, int count, Values& values) const {
    const Row& row = stepper.row;
    if (is_by_vectors(count)) {
#pragma unroll
      for (int k = 0; k < kRuleOperands<Rule>; ++k) {
        if (!stepper.writes(k) || is_codes(k)) continue;
        const Format format = format_of(row, k);
        const std::size_t bytes = size_of(format);
        onepass::store<float>(encode(format, values[k]), stepper.data[k] + static_cast<std::uint64_t>(at) * bytes,
                              bytes, true);
      }
      return;
    }
    if (stepper.has_master())
      for_each_element(at, count, [&](int k, int i, std::int64_t offset) {
        if (k != kMasterSlot<Rule>) return;
        float param = get(values[kParam], i);
        stepper.split_element(offset, param);
        set(values[kParam], i, param);
      });
    for_each_element(at, count, [&](int k, int i, std::int64_t offset) {
      if (k != static_cast<int>(kGrad) && k != kMasterSlot<Rule>)
        store_element(format_of(row, operand_of<Rule>(k)), stepper.data[k], offset, get(values[k], i));
    });
  }

  // Whether `count` elements are read and written as vectors.
  ONEPASS_INLINE bool is_by_vectors(int count) const { return vectors && count == kOwn; }

  // Rounds `count` elements of the operands of 16 bits that are rounded. `index` is the first one's in the whole
  // tensor.
  ONEPASS_INLINE void round(Values& values, std::int64_t index, int count) const {
#pragma unroll
    for (int k = 0; k < kRuleOperands<Rule>; ++k) {
      if ((words.rounds >> k & 1) == 0) continue;
      const std::size_t stream =
          k == static_cast<int>(kParam) ? kParamStream : static_cast<std::size_t>(k) - kFirstState;
      const bool is_bfloat16 = format_of(stepper.row, k) == Format::bfloat16;
#pragma unroll
      for (int i = 0; i < kOwn; ++i) {
        if (i >= count) continue;
        const std::uint32_t random = sixteen_of(stream % 2 != 0, random_bits(first_product(key, stream, index + i)));
        values[k][i] =
            is_bfloat16 ? rounded(BFloat16{}, values[k][i], random) : rounded(Float16{}, values[k][i], random);
      }
    }
  }

  // Calls visit(state) for each state in blocks; the state is a compile-time constant.
  template <class Visit>
  ONEPASS_INLINE void visit_states(Visit&& visit) const {
    if constexpr (has_codings<Rule>)
      [&]<std::size_t... State>(std::index_sequence<State...>) {
        ((in_blocks(State) ? visit(std::integral_constant<std::size_t, State>{}) : void()), ...);
      }(std::make_index_sequence<Rule::state_names.size()>{});
  }

  // Steps a block: the elements of row `row` from `column` on. `lane` is the thread's place among the block's threads.
  ONEPASS_INLINE void step(std::int64_t row, std::int64_t column, std::int64_t block, int lane) const {
    const auto length = static_cast<std::int64_t>(words.row_length);
    const std::int64_t begin = row * length + column;
    const std::int64_t rest = length - column;
    Values values[kPlayed] = {};
    int counts[kPlayed];
    std::uint32_t largest[kStates == 0 ? 1 : kStates] = {};
#pragma unroll
    for (int played = 0; played < kPlayed; ++played) {
      counts[played] = count_of_lane(rest, lane + played);
      const std::int64_t at = begin + (lane + played) * kOwn;
      if (counts[played] == 0) continue;
      load(at, block, counts[played], values[played]);
      stepper.apply(values[played],
                    [&] { round(values[played], static_cast<std::int64_t>(words.first) + at, counts[played]); });
      store(at, counts[played], values[played]);
      visit_states([&]<std::size_t state>(std::integral_constant<std::size_t, state>) {
        constexpr Coding coding = coding_of<Rule>(state);
        auto& own_values = values[played][kFirstState + state];
#pragma unroll
        for (int i = 0; i < kOwn; ++i) {
          if (i >= counts[played]) continue;
          own_values[i] = stored_value<coding>(own_values[i]);
          const auto magnitude = magnitude_of<std::uint32_t>(own_values[i]);
          largest[state] = magnitude > largest[state] ? magnitude : largest[state];
        }
      });
    }
    visit_states([&]<std::size_t state>(std::integral_constant<std::size_t, state>) {
      constexpr Coding coding = coding_of<Rule>(state);
      const std::uint32_t scale = scale_for(largest_of_lanes(largest[state]));
      const auto factor = encoding_factor<float>(scale);
      if (lane == 0) at_address<std::uint8_t>(words.scales[state])[block] = static_cast<std::uint8_t>(scale);
      const BlockRandom random = block_random(key, state, static_cast<std::int64_t>(words.first) + begin);
#pragma unroll
      for (int played = 0; played < kPlayed; ++played) {
        auto* codes = at_address<std::uint8_t>(stepper.data[kFirstState + state]) + begin + (lane + played) * kOwn;
#pragma unroll
        for (int i = 0; i < kOwn; ++i) {
          if (i >= counts[played]) continue;
          const auto element = static_cast<std::uint32_t>((lane + played) * kOwn + i);
          const auto code = code_of(encode_state<coding>(values[played][kFirstState + state][i], factor,
                                                         random.bits(hash_of_place(element))));
          codes[i] = scale == kNanScale ? std::uint8_t{0} : code;
        }
      }
    });
  }

  ONEPASS_INLINE void zero_gradient(std::int64_t at, int count) const {
    const Format format = format_of(stepper.row, static_cast<int>(kGrad));
    for_each_element(at, count, [&](int k, int, std::int64_t offset) {
      if (k == static_cast<int>(kGrad)) store_element(format, stepper.data[kGrad], offset, 0.0F);
    });
  }
};

// Returns the words of a row that is rounded with random bits, or has states in blocks.
template <class TableType>
ONEPASS_INLINE const StochasticWords& stochastic_words(const TableType& table, const Row& row) {
  return *reinterpret_cast<const StochasticWords*>(table.words + row.pointers + operands_of(row));
}

template <class Rule, class TableType>
ONEPASS_INLINE StochasticStepper<Rule> stochastic_stepper_of(const TableType& table,
                                                             const Stepper<Rule, float>& stepper, std::uint64_t key) {
  const Row& row = stepper.row;
  const StochasticWords& words = stochastic_words(table, row);
  unsigned codes = 0;
  for (std::size_t state = 0; state < kMaxStates; ++state)
    if (words.scales[state] != 0) codes |= 1U << (kFirstState + state);
  return {
      .stepper = stepper,
      .words = words,
      .layout = row.has_layout != 0 ? table.words + row.layout : nullptr,
      .key = key,
      .vectors = (row.held & ~row.aligned & ~codes) == 0,
  };
}

// Calls visit(row, column, number, lane) for the blocks of 32 elements in the share of thread `thread` of block
// `block`. Such a block has the elements of row `row` from `column` on, and `lane` is the thread's place among its
// threads.
template <class Visit>
ONEPASS_INLINE void for_each_block(const Header& header, const Row& row, const StochasticWords& words,
                                   std::uint32_t block, std::uint32_t thread, Visit&& visit) {
  const auto length = static_cast<std::int64_t>(words.row_length);
  const std::int64_t in_row = (length + kBlockLength - 1) / kBlockLength;
  const std::int64_t all = row.length / length * in_row;
  const std::int64_t in_chunk = header.chunk / kBlockLength;
  const std::int64_t begin = std::int64_t{block - row.first_block} * in_chunk;
  const std::int64_t end = begin + in_chunk < all ? begin + in_chunk : all;
  const int lane = static_cast<int>(thread % kLanes);
  if (lane % kPlayed != 0) return;
  for (std::int64_t at = begin + thread / kLanes; at < end; at += cuda::kThreads / kLanes) {
    const std::int64_t own_row = at / in_row;
    visit(own_row, (at - own_row * in_row) * kBlockLength, at, lane);
  }
}

// Does the work of thread `thread` of block `block`, of rows that are rounded with random bits.
template <class Rule, class TableType>
ONEPASS_INLINE void step_stochastic_chunk(const TableType& table, std::uint32_t block, std::uint32_t thread) {
  const Header& header = table.header;
  const Row row = reinterpret_cast<const Row*>(table.words)[find_row(table, block)];
  const bool skipped = is_skipped(header);
  if (skipped && row.zeroes_grad == 0) return;
  const auto stepper = stepper_of<Rule, float>(table, row);
  const StochasticWords& words = stochastic_words(table, row);
  double step = 0.0;
  if (words.step_format == cuda::kValue) {
    step = static_cast<double>(words.step);
  } else {
    step = read_number(&words.step, words.step_format, 0);
  }
  const auto own =
      stochastic_stepper_of(table, stepper, random_key(words.seed, static_cast<std::uint64_t>(step), words.param));
  const auto length = static_cast<std::int64_t>(words.row_length);
  for_each_block(header, row, words, block, thread,
                 [&](std::int64_t own_row, std::int64_t column, std::int64_t number, int lane) {
                   if (!skipped) own.step(own_row, column, number, lane);
                   if (row.zeroes_grad == 0) return;
                   for (int played = 0; played < kPlayed; ++played)
                     own.zero_gradient(own_row * length + column + (lane + played) * kOwn,
                                       count_of_lane(length - column, lane + played));
                 });
}

}  // namespace onepass::inline ONEPASS_TARGET
