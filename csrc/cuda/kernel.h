// The kernels: the work of one thread of one block. Plain C++, so that the tests run the same lines on the CPU.
//
// A block steps one chunk of one row, in one of three ways: vectors of 16 bytes if all operands are plain arrays, which
// is the usual case; vectors of each operand's own format; and element by element, for the ends of a tensor and for
// strides. All of a thread's loads are issued before the first of them is used.
#pragma once

#include <bit>
#include <cstring>
#include <type_traits>
#include <utility>

#include "cuda/table.h"
#include "formats/low_bits.h"
#include "formats/with_format.h"
#include "rules/math.h"
#include "target.h"

namespace onepass::inline ONEPASS_TARGET {

using cuda::Access;
using cuda::Counter;
using cuda::Header;
using cuda::Row;

// Elements that a thread steps at a time: 16 bytes of the arithmetic type.
template <class T>
inline constexpr int kWidth = 16 / sizeof(T);

// A vector as it is stored. Narrow formats use only the first bytes.
struct Vector {
  std::uint32_t words[4] = {};
};

template <class Value>
ONEPASS_INLINE Value* at_address(std::uint64_t address) {
  return reinterpret_cast<Value*>(address);
}

// Load and store 16, 8 or 4 bytes of the GPU's memory, at addresses that are multiples of that size. In assembler,
// because the compiler does not know that these addresses are global, and because `volatile` is needed only for the
// order.
template <int Words>
ONEPASS_INLINE Vector load_words(std::uint64_t address) {
  Vector vector;
#ifdef __CUDA_ARCH__
  auto& [a, b, c, d] = vector.words;
  if constexpr (Words == 4) {
    asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(a), "=r"(b), "=r"(c), "=r"(d) : "l"(address));
  } else if constexpr (Words == 2) {
    asm volatile("ld.global.v2.u32 {%0, %1}, [%2];" : "=r"(a), "=r"(b) : "l"(address));
  } else {
    asm volatile("ld.global.u32 %0, [%1];" : "=r"(a) : "l"(address));
  }
#else
  std::memcpy(vector.words, at_address<const void>(address), Words * sizeof(std::uint32_t));
#endif
  return vector;
}

template <int Words>
ONEPASS_INLINE void store_words(const Vector& vector, std::uint64_t address) {
#ifdef __CUDA_ARCH__
  const auto& [a, b, c, d] = vector.words;
  if constexpr (Words == 4) {
    asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(address), "r"(a), "r"(b), "r"(c), "r"(d) : "memory");
  } else if constexpr (Words == 2) {
    asm volatile("st.global.v2.u32 [%0], {%1, %2};" ::"l"(address), "r"(a), "r"(b) : "memory");
  } else {
    asm volatile("st.global.u32 [%0], %1;" ::"l"(address), "r"(a) : "memory");
  }
#else
  std::memcpy(at_address<void>(address), vector.words, Words * sizeof(std::uint32_t));
#endif
}

// Returns x, or zero if x is denormal. The compiler flushes denormal floats (-ftz=true). There is no such option for
// doubles, so they are flushed where they are read and written.
ONEPASS_INLINE float flushed(float x) { return x; }
ONEPASS_INLINE double flushed(double x) {
#ifdef __CUDA_ARCH__
  return fabs(x) < 0x1p-1022 ? copysign(0.0, x) : x;
#else
  return x;
#endif
}

ONEPASS_INLINE Format format_of(const Row& row, int operand) {
  return static_cast<Format>(row.formats >> (4 * operand) & 0xfU);
}

// -- vectors of a format ---------------------------------------------------------------------------------------------

// Load and store the elements that a thread steps at a time. Each has `bytes` bytes (2 to 8), all have at most 16.
template <class T>
ONEPASS_INLINE Vector load(std::uint64_t address, std::size_t bytes, bool aligned) {
  if (aligned) {
    if (bytes == sizeof(T)) return load_words<4>(address);
    if (bytes * 2 == sizeof(T)) return load_words<2>(address);
    return load_words<1>(address);
  }
  Vector vector;
  if (bytes == 2) {
    const auto* source = at_address<const std::uint16_t>(address);
#pragma unroll
    for (int i = 0; i < kWidth<T>; ++i) vector.words[i / 2] |= std::uint32_t{source[i]} << (16 * (i % 2));
  } else {
    const auto* source = at_address<const std::uint32_t>(address);
    const int words = bytes == sizeof(T) ? 4 : 2;
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (i < words) vector.words[i] = source[i];
  }
  return vector;
}

template <class T>
ONEPASS_INLINE void store(const Vector& vector, std::uint64_t address, std::size_t bytes, bool aligned) {
  if (aligned) {
    if (bytes == sizeof(T)) return store_words<4>(vector, address);
    if (bytes * 2 == sizeof(T)) return store_words<2>(vector, address);
    return store_words<1>(vector, address);
  }
  if (bytes == 2) {
    auto* target = at_address<std::uint16_t>(address);
#pragma unroll
    for (int i = 0; i < kWidth<T>; ++i) target[i] = static_cast<std::uint16_t>(vector.words[i / 2] >> (16 * (i % 2)));
  } else {
    auto* target = at_address<std::uint32_t>(address);
    const int words = bytes == sizeof(T) ? 4 : 2;
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (i < words) target[i] = vector.words[i];
  }
}

template <class Codec, class T>
ONEPASS_INLINE void decode_as(const Vector& vector, T* values) {
  typename Codec::Storage stored[kWidth<T>];
  if constexpr (sizeof stored <= sizeof vector) {
    std::memcpy(stored, vector.words, sizeof stored);
#pragma unroll
    for (int i = 0; i < kWidth<T>; ++i) values[i] = Codec::template decode<T>(stored[i]);
  }
}

template <class Codec, class T>
ONEPASS_INLINE void encode_as(const T* values, Vector& vector) {
  typename Codec::Storage stored[kWidth<T>];
  if constexpr (sizeof stored <= sizeof vector) {
#pragma unroll
    for (int i = 0; i < kWidth<T>; ++i) stored[i] = Codec::template encode<T>(values[i]);
    std::memcpy(vector.words, stored, sizeof stored);
  }
}

template <class T>
ONEPASS_INLINE void decode(Format format, const Vector& vector, T* values) {
  with_format(format, [&]<class Codec>(Codec) { decode_as<Codec>(vector, values); });
}

template <class T>
ONEPASS_INLINE Vector encode(Format format, const T* values) {
  Vector vector;
  with_format(format, [&]<class Codec>(Codec) { encode_as<Codec>(values, vector); });
  return vector;
}

// -- single elements -------------------------------------------------------------------------------------------------

template <class T>
ONEPASS_INLINE T load_element(Format format, std::uint64_t data, std::int64_t at) {
  return with_format(format, [&]<class Codec>(Codec) {
    return Codec::template decode<T>(at_address<const typename Codec::Storage>(data)[at]);
  });
}

template <class T>
ONEPASS_INLINE void store_element(Format format, std::uint64_t data, std::int64_t at, T value) {
  with_format(format, [&]<class Codec>(Codec) {
    at_address<typename Codec::Storage>(data)[at] = Codec::template encode<T>(value);
  });
}

// Finds the offset in each operand of element `at` of a row that is packed (null) or has a layout. has(k): whether the
// row has the k-th operand.
template <int Count, class Has>
ONEPASS_INLINE void find_offsets(const std::uint64_t* layout, std::int64_t at, Has&& has,
                                 std::int64_t (&offsets)[Count]) {
#pragma unroll
  for (int k = 0; k < Count; ++k) offsets[k] = layout == nullptr ? at : 0;
  if (layout == nullptr) return;
  const auto dimensions = static_cast<int>(layout[0]);
  const std::uint64_t* shape = layout + 1;
  auto rest = static_cast<std::uint64_t>(at);
  for (int d = dimensions; d-- > 0;) {
    std::uint64_t index;
    if (rest >> 32 == 0 && shape[d] >> 32 == 0) {  // 32-bit division is several times faster
      const auto size = static_cast<std::uint32_t>(shape[d]);
      index = static_cast<std::uint32_t>(rest) % size;
      rest = static_cast<std::uint32_t>(rest) / size;
    } else {
      index = rest % shape[d];
      rest /= shape[d];
    }
    const std::uint64_t* stride = shape + dimensions + d;
#pragma unroll
    for (int k = 0; k < Count; ++k)
      if (has(k)) {
        offsets[k] += static_cast<std::int64_t>(index * *stride);
        stride += dimensions;
      }
  }
}

// A block's share of a row: `head` single elements from `begin` on, whole vectors, and single elements up to `end`. The
// first chunk includes the elements before the first vector, and the last chunk those after the last vector.
struct Share {
  std::int64_t begin, end, head;
  std::uint32_t vectors;

  ONEPASS_INLINE Share(const Row& row, std::uint32_t chunk, std::uint32_t block, int width) {
    const std::int64_t number = block - row.first_block;
    begin = number == 0 ? 0 : row.phase + number * chunk;
    const std::int64_t full = row.phase + (number + 1) * chunk;
    end = full < row.length ? full : row.length;
    head = number == 0 ? row.phase : 0;
    if (head > end - begin) head = end - begin;
    vectors = static_cast<std::uint32_t>((end - begin - head) / width);
  }

  // Returns the first element of the first vector, and the first element after the last vector.
  ONEPASS_INLINE std::int64_t first_vector() const { return begin + head; }
  ONEPASS_INLINE std::int64_t behind(int width) const { return first_vector() + std::int64_t{vectors} * width; }

  // Returns the number of single elements, and the position of one of them.
  ONEPASS_INLINE std::int64_t singles(int width) const { return head + (end - behind(width)); }
  ONEPASS_INLINE std::int64_t single(std::int64_t i, int width) const {
    return i < head ? begin + i : behind(width) + (i - head);
  }
};

// -- the rule --------------------------------------------------------------------------------------------------------

// The number of the kernel's operands: parameter, gradient and the rule's states, and then the followers.
template <class Rule>
inline constexpr int kRuleOperands = static_cast<int>(kFirstState + Rule::state_names.size());
template <class Rule>
inline constexpr int kOperands = kRuleOperands<Rule> + static_cast<int>(kMaxFollowers);
template <class Rule>
inline constexpr int kMasterSlot = kOperands<Rule>;  // of its address, behind those of the operands

// Returns the index in a row's operands of the kernel's k-th operand.
template <class Rule>
ONEPASS_INLINE constexpr int operand_of(int k) {
  return k < kRuleOperands<Rule> ? k : static_cast<int>(kFirstFollower) + (k - kRuleOperands<Rule>);
}

// What the threads of a block share: its row, the constants, and the addresses of its operands.
template <class Rule, class T>
struct Stepper {
  Row row;
  typename Rule::template Constants<T> constants;
  T factor;
  const Header& header;
  std::uint64_t data[kOperands<Rule> + 1];  // addresses; 0: the row does not have this operand

  // In the kernel's argument, so it needs no register.
  ONEPASS_INLINE T clip_value() const {
    if constexpr (sizeof(T) == sizeof(float)) {
      return header.narrow_clip_value;
    } else {
      return header.clip_value;
    }
  }

  ONEPASS_INLINE bool has(int k) const { return data[k] != 0; }
  ONEPASS_INLINE bool writes(int k) const { return has(k) && k != static_cast<int>(kGrad); }

  // Applies the rule to the i-th elements of all operands.
  template <int Count>
  ONEPASS_INLINE void step_value(T (&values)[kOperands<Rule>][Count], int i) const {
    [&]<std::size_t... State>(std::index_sequence<State...> /*states*/) {
      T p = flushed(values[kParam][i]);
      T s[] = {flushed(values[kFirstState + State][i])..., T(0)};
      Rule::update(constants, p, clamped(factor * flushed(values[kGrad][i]), clip_value()), s[State]...);
      values[kParam][i] = flushed(p);
      ((values[kFirstState + State][i] = flushed(s[State])), ...);
    }(std::make_index_sequence<Rule::state_names.size()>{});
  }

  // Rounds the parameter to its format.
  template <int Count>
  ONEPASS_INLINE void round_param(T (&values)[kOperands<Rule>][Count]) const {
    const Format format = format_of(row, static_cast<int>(kParam));
    if (size_of(format) == sizeof(T)) return;
    with_format(format, [&]<class Codec>(Codec) {
#pragma unroll
      for (int i = 0; i < Count; ++i)
        values[kParam][i] = Codec::template decode<T>(Codec::template encode<T>(values[kParam][i]));
    });
  }

  ONEPASS_INLINE bool has_master() const {
    if constexpr (sizeof(T) == sizeof(float)) {
      return row.master != Master::none;
    } else {
      return false;
    }
  }

  // Returns the master of a parameter (see cpu/master.h). `stored`: the whole master or the low bits.
  ONEPASS_INLINE T join(T param, std::uint32_t stored) const {
    if constexpr (sizeof(T) == sizeof(float)) {
      if (row.master == Master::low_bits) return LowBits::join(param, static_cast<std::uint16_t>(stored));
      const auto master = std::bit_cast<float>(stored);
      const bool is_bfloat16 = format_of(row, static_cast<int>(kParam)) == Format::bfloat16;
      const float rounded = is_bfloat16 ? BFloat16::decode<float>(BFloat16::encode(master))
                                        : Float16::decode<float>(Float16::encode(master));
      return is_copy(param, rounded) ? master : param;
    } else {
      return param;
    }
  }

  // Returns the whole master or the low bits, to be stored. With low bits, rounds the parameter.
  ONEPASS_INLINE std::uint32_t split(T& param) const {
    if constexpr (sizeof(T) == sizeof(float)) {
      if (row.master == Master::whole) return std::bit_cast<std::uint32_t>(param);
      const std::uint32_t low = LowBits::low_of(param);
      param = BFloat16::decode<float>(LowBits::high_of(param));
      return low;
    } else {
      return 0;
    }
  }

  // The same for one vector of the parameter and for one element, in memory.
  ONEPASS_INLINE void join_vector(std::int64_t at, T (&param)[kWidth<T>]) const {
    const bool is_whole = row.master == Master::whole;
    const Vector stored = load<T>(master_address(at), master_size(), (row.aligned >> kMaster & 1) != 0);
#pragma unroll
    for (int i = 0; i < kWidth<T>; ++i)
      param[i] = join(param[i], is_whole ? stored.words[i] : stored.words[i / 2] >> (16 * (i % 2)));
  }
  ONEPASS_INLINE void split_vector(std::int64_t at, T (&param)[kWidth<T>]) const {
    const bool is_whole = row.master == Master::whole;
    Vector stored;
#pragma unroll
    for (int i = 0; i < kWidth<T>; ++i) {
      const std::uint32_t bits = split(param[i]);
      if (is_whole) {
        stored.words[i] = bits;
      } else {
        stored.words[i / 2] |= bits << (16 * (i % 2));
      }
    }
    store<T>(stored, master_address(at), master_size(), (row.aligned >> kMaster & 1) != 0);
  }
  ONEPASS_INLINE void join_element(std::int64_t offset, T& param) const {
    const std::uint64_t address = master_address(offset);
    param = join(param, row.master == Master::whole ? *at_address<const std::uint32_t>(address)
                                                    : *at_address<const std::uint16_t>(address));
  }
  ONEPASS_INLINE void split_element(std::int64_t offset, T& param) const {
    const std::uint64_t address = master_address(offset);
    const std::uint32_t bits = split(param);
    if (row.master == Master::whole) {
      *at_address<std::uint32_t>(address) = bits;
    } else {
      *at_address<std::uint16_t>(address) = static_cast<std::uint16_t>(bits);
    }
  }

  ONEPASS_INLINE std::size_t master_size() const {
    return row.master == Master::whole ? sizeof(float) : sizeof(std::uint16_t);
  }
  ONEPASS_INLINE std::uint64_t master_address(std::int64_t offset) const {
    return data[kMasterSlot<Rule>] + static_cast<std::uint64_t>(offset) * master_size();
  }

  // Applies the rule, calls round(), and then updates the followers (see cpu/followers.h).
  template <int Count, class Round>
  ONEPASS_INLINE void apply(T (&values)[kOperands<Rule>][Count], Round&& round) const {
#pragma unroll
    for (int i = 0; i < Count; ++i) step_value(values, i);
    round();
#pragma unroll
    for (int f = 0; f < static_cast<int>(kMaxFollowers); ++f) {
      const int k = kRuleOperands<Rule> + f;
      if (!has(k)) continue;
      const Follower& follower = header.followers[f];
      if (!follower.sets_param && !has_master()) round_param(values);
      const Average<T> towards(1.0 - follower.weight, follower.weight);
#pragma unroll
      for (int i = 0; i < Count; ++i) {
        T p = values[kParam][i];
        if (has_master() && row.master == Master::low_bits && follower.weight == 1.0 && !follower.sets_param &&
            format_of(row, operand_of<Rule>(k)) == Format::bfloat16)
          split(p);  // a copy has the bits of the parameter
        values[k][i] = follower.weight == 1.0 ? p : flushed(towards(flushed(values[k][i]), p));
        if (follower.sets_param) values[kParam][i] = values[k][i];
      }
    }
  }

  // Steps this thread's share of `vectors` vectors from element `begin` on. Parameter and gradient have one format, all
  // states have one format, all operands are aligned, and there are no followers.
  template <class Own, class States>
  ONEPASS_INLINE void step_vectors(std::int64_t begin, std::uint32_t vectors, std::uint32_t thread) const {
    constexpr int operands = kRuleOperands<Rule>;
    constexpr int own_bytes = sizeof(typename Own::Storage) * kWidth<T>;
    constexpr int state_bytes = sizeof(typename States::Storage) * kWidth<T>;
    const auto is_own = [](int k) { return k < static_cast<int>(kFirstState); };
    std::uint64_t address[operands];
#pragma unroll
    for (int k = 0; k < operands; ++k) {
      const int bytes = (is_own(k) ? own_bytes : state_bytes) / kWidth<T>;
      address[k] = has(k) ? data[k] + static_cast<std::uint64_t>(begin * bytes) : 0;
    }
#pragma unroll 1
    for (std::uint32_t v = thread; v < vectors; v += cuda::kThreads) {
      Vector stored[operands];
#pragma unroll
      for (int k = 0; k < operands; ++k) {
        if (address[k] == 0) continue;
        stored[k] = is_own(k) ? load_words<own_bytes / 4>(address[k] + std::uint64_t{v} * own_bytes)
                              : load_words<state_bytes / 4>(address[k] + std::uint64_t{v} * state_bytes);
      }
      T values[kOperands<Rule>][kWidth<T>];
#pragma unroll
      for (int k = 0; k < operands; ++k)
        is_own(k) ? decode_as<Own>(stored[k], values[k]) : decode_as<States>(stored[k], values[k]);
#pragma unroll
      for (int i = 0; i < kWidth<T>; ++i) step_value(values, i);
#pragma unroll
      for (int k = 0; k < operands; ++k) {
        if (address[k] == 0 || k == static_cast<int>(kGrad)) continue;
        if (is_own(k)) {
          encode_as<Own>(values[k], stored[k]);
          store_words<own_bytes / 4>(stored[k], address[k] + std::uint64_t{v} * own_bytes);
        } else {
          encode_as<States>(values[k], stored[k]);
          store_words<state_bytes / 4>(stored[k], address[k] + std::uint64_t{v} * state_bytes);
        }
      }
    }
  }

  // Calls work(format, address, bytes, aligned) for the vector of an operand that begins at element `at`.
  template <class Work>
  ONEPASS_INLINE void visit_vector(int k, std::int64_t at, Work&& work) const {
    const Format format = format_of(row, operand_of<Rule>(k));
    const std::size_t bytes = size_of(format);
    const bool aligned = (row.aligned >> operand_of<Rule>(k) & 1) != 0;
    work(format, data[k] + static_cast<std::uint64_t>(at) * bytes, bytes, aligned);
  }

  // Reads a vector of each of the first `Operands` operands that the row has, each in its own format, aligned or not.
  template <int Operands>
  ONEPASS_INLINE void read_vectors(std::int64_t at, T (&values)[kOperands<Rule>][kWidth<T>]) const {
    Vector vectors[Operands];
#pragma unroll
    for (int k = 0; k < Operands; ++k)
      if (has(k))
        visit_vector(k, at, [&](Format, std::uint64_t address, std::size_t bytes, bool aligned) {
          vectors[k] = load<T>(address, bytes, aligned);
        });
#pragma unroll
    for (int k = 0; k < Operands; ++k)
      if (has(k)) decode(format_of(row, operand_of<Rule>(k)), vectors[k], values[k]);
  }

  // Steps one vector. kMastered: the row has a master and no followers; both would need more registers than there are.
  template <bool kMastered>
  ONEPASS_INLINE void step_mixed(std::int64_t at) const {
    constexpr int operands = kMastered ? kRuleOperands<Rule> : kOperands<Rule>;
    T values[kOperands<Rule>][kWidth<T>] = {};
    read_vectors<operands>(at, values);
    if constexpr (kMastered) {
      join_vector(at, values[kParam]);
#pragma unroll
      for (int i = 0; i < kWidth<T>; ++i) step_value(values, i);
      split_vector(at, values[kParam]);
    } else {
      apply(values, [] {});
    }
#pragma unroll
    for (int k = 0; k < operands; ++k)
      if (writes(k))
        visit_vector(k, at, [&](Format format, std::uint64_t address, std::size_t bytes, bool aligned) {
          store<T>(encode(format, values[k]), address, bytes, aligned);
        });
  }

  // Reads a single element of a row that is packed or has a layout: its offset in each operand, and its values, with
  // the master, if there is one, in place of the parameter.
  ONEPASS_INLINE void read_element(std::int64_t at, const std::uint64_t* layout,
                                   std::int64_t (&offsets)[kOperands<Rule> + 1],
                                   T (&values)[kOperands<Rule>][1]) const {
    find_offsets(layout, at, [&](int k) { return has(k); }, offsets);
#pragma unroll
    for (int k = 0; k < kOperands<Rule>; ++k)
      if (has(k)) values[k][0] = load_element<T>(format_of(row, operand_of<Rule>(k)), data[k], offsets[k]);
    if (has_master()) join_element(offsets[kMasterSlot<Rule>], values[kParam][0]);
  }

  // Steps a single element.
  ONEPASS_INLINE void step_element(std::int64_t at, const std::uint64_t* layout) const {
    std::int64_t offsets[kOperands<Rule> + 1];
    T values[kOperands<Rule>][1] = {};
    read_element(at, layout, offsets, values);
    apply(values, [] {});
    if (has_master()) split_element(offsets[kMasterSlot<Rule>], values[kParam][0]);
#pragma unroll
    for (int k = 0; k < kOperands<Rule>; ++k)
      if (writes(k)) store_element(format_of(row, operand_of<Rule>(k)), data[k], offsets[k], values[k][0]);
  }

  // Steps a thread's share of a chunk.
  ONEPASS_INLINE void step_own(const Share& share, const std::uint64_t* layout, std::uint32_t thread) const {
    constexpr int width = kWidth<T>;
    if (row.access == Access::elements) {
      for (std::int64_t at = share.begin + thread; at < share.end; at += cuda::kThreads) step_element(at, layout);
      return;
    }
    if (thread < share.singles(width)) step_element(share.single(thread, width), nullptr);
    const std::int64_t first = share.first_vector();
    using Native = std::conditional_t<sizeof(T) == sizeof(float), Float32, Float64>;
    if (row.access == Access::plain) return step_vectors<Native, Native>(first, share.vectors, thread);
    if constexpr (sizeof(T) == sizeof(float)) {
      switch (row.access) {
        case Access::bfloat16:
          return step_vectors<BFloat16, BFloat16>(first, share.vectors, thread);
        case Access::float16:
          return step_vectors<Float16, Float16>(first, share.vectors, thread);
        case Access::bfloat16_states:
          return step_vectors<Float32, BFloat16>(first, share.vectors, thread);
        case Access::float32_states:
          return step_vectors<BFloat16, Float32>(first, share.vectors, thread);
        default:
          break;
      }
    }
    if constexpr (sizeof(T) == sizeof(float))
      if (row.master != Master::none) {
#pragma unroll 1
        for (std::uint32_t v = thread; v < share.vectors; v += cuda::kThreads)
          step_mixed<true>(first + static_cast<std::int64_t>(v) * width);
        return;
      }
#pragma unroll 1
    for (std::uint32_t v = thread; v < share.vectors; v += cuda::kThreads)
      step_mixed<false>(first + static_cast<std::int64_t>(v) * width);
  }

  // Zeroes the gradient in a thread's share of a chunk, which only this thread reads. A loop of its own, because the
  // loops that step would need more registers than they have.
  ONEPASS_INLINE void zero_own(const Share& share, const std::uint64_t* layout, std::uint32_t thread) const {
    constexpr int width = kWidth<T>;
    const Format format = format_of(row, static_cast<int>(kGrad));
    if (row.access == Access::elements) {
      for (std::int64_t at = share.begin + thread; at < share.end; at += cuda::kThreads) {
        std::int64_t offsets[kOperands<Rule>];
        find_offsets(layout, at, [&](int k) { return has(k); }, offsets);
        store_element(format, data[kGrad], offsets[kGrad], T(0));
      }
      return;
    }
    if (thread < share.singles(width)) store_element(format, data[kGrad], share.single(thread, width), T(0));
    const std::size_t bytes = size_of(format);
    const bool aligned = (row.aligned >> kGrad & 1) != 0;
    const std::uint64_t first = data[kGrad] + static_cast<std::uint64_t>(share.first_vector()) * bytes;
#pragma unroll 1
    for (std::uint32_t v = thread; v < share.vectors; v += cuda::kThreads)
      store<T>(Vector{}, first + std::uint64_t{v} * width * bytes, bytes, aligned);
  }
};

// -- a block ---------------------------------------------------------------------------------------------------------

// Returns the row that a block belongs to.
template <class TableType>
ONEPASS_INLINE std::uint32_t find_row(const TableType& table, std::uint32_t block) {
  const auto* rows = reinterpret_cast<const Row*>(table.words);
  std::uint32_t row = 0;
  for (std::uint32_t end = table.header.rows; end - row > 1;) {
    const std::uint32_t middle = row + (end - row) / 2;
    if (rows[middle].first_block <= block) {
      row = middle;
    } else {
      end = middle;
    }
  }
  return row;
}

template <class Constants, class TableType>
ONEPASS_INLINE Constants constants_of(const TableType& table, std::uint32_t at) {
  constexpr std::size_t count = sizeof(Constants) / sizeof(std::uint32_t);
  struct Words {
    std::uint32_t words[count];
  } words;
  static_assert(sizeof(Words) == sizeof(Constants));
  if (table.header.workspace != 0) {
    const auto* source = at_address<const std::uint32_t>(table.header.workspace + std::uint64_t{at} * 8);
#pragma unroll
    for (std::size_t i = 0; i < count; ++i) words.words[i] = source[i];
  } else {
    const auto* source = reinterpret_cast<const std::uint32_t*>(table.words + at);
#pragma unroll
    for (std::size_t i = 0; i < count; ++i) words.words[i] = source[i];
  }
  return __builtin_bit_cast(Constants, words);  // std::bit_cast of these types is not a device function
}

// Whether GradScaler has found infinite or NaN gradients.
ONEPASS_INLINE bool has_found_inf(std::uint64_t found_inf) {
  return found_inf != 0 && *at_address<const float>(found_inf) != 0.0F;
}

// Whether the step is skipped.
ONEPASS_INLINE bool is_skipped(const Header& header) {
  return has_found_inf(header.found_inf) ||
         (header.clipping != 0 && at_address<const cuda::DeviceClipping>(header.clipping)->skips != 0.0);
}

// Returns the factor that undoes GradScaler's scale of the gradients.
ONEPASS_INLINE double unscaling(std::uint64_t grad_scale) {
  return grad_scale != 0 ? 1.0 / static_cast<double>(*at_address<const float>(grad_scale)) : 1.0;
}

// Returns the number of a row's operands, whose addresses are in the table.
ONEPASS_INLINE int operands_of(const Row& row) {
  int count = 0;
#pragma unroll
  for (std::size_t k = 0; k < kMaxOperands; ++k) count += row.held >> k & 1;
  return count;
}

// Returns the stepper of a row.
template <class Rule, class T, class TableType>
ONEPASS_INLINE Stepper<Rule, T> stepper_of(const TableType& table, const Row& row) {
  const Header& header = table.header;
  double factor = row.maximize != 0 ? -header.grad_factor : header.grad_factor;
  if (header.grad_scale != 0) factor *= unscaling(header.grad_scale);
  if (header.clipping != 0) factor *= at_address<const cuda::DeviceClipping>(header.clipping)->coefficient;
  Stepper<Rule, T> stepper{.row = row,
                           .constants = constants_of<typename Rule::template Constants<T>>(table, row.constants),
                           .factor = static_cast<T>(factor),
                           .header = header,
                           .data = {}};
  const std::uint64_t* pointer = table.words + row.pointers;
#pragma unroll
  for (int k = 0; k < kOperands<Rule>; ++k)
    if ((row.held >> operand_of<Rule>(k) & 1) != 0) stepper.data[k] = *pointer++;
  if (row.master != Master::none) stepper.data[kMasterSlot<Rule>] = *pointer;
  return stepper;
}

// Does the work of thread `thread` of block `block`.
template <class Rule, class T, class TableType>
ONEPASS_INLINE void step_chunk(const TableType& table, std::uint32_t block, std::uint32_t thread) {
  const Header& header = table.header;
  const Row row = reinterpret_cast<const Row*>(table.words)[find_row(table, block)];
  const bool skipped = is_skipped(header);
  if (skipped && row.zeroes_grad == 0) return;
  const auto stepper = stepper_of<Rule, T>(table, row);
  const Share share(row, header.chunk, block, kWidth<T>);
  const std::uint64_t* layout = row.has_layout != 0 ? table.words + row.layout : nullptr;
  if (!skipped) stepper.step_own(share, layout, thread);
  if (row.zeroes_grad != 0) stepper.zero_own(share, layout, thread);
}

// -- numbers in the GPU's memory -------------------------------------------------------------------------------------

// Read and write one of several numbers: a value or, more often, an address. `formats` has four bits for each.
ONEPASS_INLINE double read_number(const std::uint64_t* numbers, std::uint64_t formats, int n) {
  const auto format = static_cast<unsigned>(formats >> (4 * n) & 0xfU);
  if (format == cuda::kValue) return std::bit_cast<double>(numbers[n]);
  if (static_cast<Format>(format) == Format::float64) return *at_address<const double>(numbers[n]);
  return static_cast<double>(*at_address<const float>(numbers[n]));
}

ONEPASS_INLINE void write_number(const std::uint64_t* numbers, std::uint64_t formats, int n, double value) {
  const auto format = static_cast<unsigned>(formats >> (4 * n) & 0xfU);
  if (format == cuda::kValue) return;
  if (static_cast<Format>(format) == Format::float64) {
    *at_address<double>(numbers[n]) = value;
  } else {
    *at_address<float>(numbers[n]) = static_cast<float>(value);
  }
}

template <class Numbers>
ONEPASS_INLINE Numbers read_numbers(const std::uint64_t* numbers, std::uint64_t formats) {
  constexpr int count = sizeof(Numbers) / sizeof(double);
  struct Values {
    double values[count];
  } read;
#pragma unroll
  for (int n = 0; n < count; ++n) read.values[n] = read_number(numbers, formats, n);
  return __builtin_bit_cast(Numbers, read);
}

// Writes a rule's scalars.
template <class Scalars>
ONEPASS_INLINE void write_numbers(const std::uint64_t* numbers, std::uint64_t formats, const Scalars& scalars) {
  constexpr int count = sizeof(Scalars) / sizeof(double);
  struct Values {
    double values[count];
  };
  const auto written = __builtin_bit_cast(Values, scalars);
#pragma unroll
  for (int n = 0; n < count; ++n) write_number(numbers, formats, n, written.values[n]);
}

// Makes the constants of one row, and counts the step unless the table only prepares.
template <class Rule, class T, class TableType>
ONEPASS_INLINE void prepare_row(const TableType& table, std::uint32_t number) {
  if (number >= table.header.rows || is_skipped(table.header)) return;
  const Counter counter = reinterpret_cast<const Counter*>(table.words)[number];
  const std::uint64_t* hyper = table.words + counter.hyper;
  const auto h = read_numbers<typename Rule::Hyper>(hyper, hyper[Rule::hyper_names.size()]);
  const double step = read_number(counter.numbers, counter.formats, 0) + 1.0;
  const bool counts = table.header.only_prepares == 0;
  if (counts) write_number(counter.numbers, counter.formats, 0, step);

  using Constants = typename Rule::template Constants<T>;
  auto* target =
      at_address<Constants>(table.header.workspace + std::uint64_t{counter.constants} * sizeof(std::uint64_t));
  if constexpr (requires { typename Rule::Scalars; }) {
    using Scalars = typename Rule::Scalars;
    const std::uint64_t* numbers = counter.numbers + 1;
    const std::uint64_t formats = counter.formats >> 4;
    const auto scalars = read_numbers<Scalars>(numbers, formats);
    *target = Rule::template prepare<T>(h, step, scalars);
    if (counts) write_numbers(numbers, formats, Rule::advance(h, step, scalars));
  } else {
    *target = Rule::template prepare<T>(h, step);
  }
}

}  // namespace onepass::inline ONEPASS_TARGET
