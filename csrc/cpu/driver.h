// The element-wise driver: one pass over a range of a tensor, in tiles that stay in the L1 cache.
//
// An operand that is stored in the arithmetic type and packed is used where it lies. Any other is decoded into a tile,
// and encoded back after the rule. So a rule meets only plain arrays, and formats and rules do not multiply.
#pragma once

#include <cstdint>
#include <utility>

#include "cpu/job.h"
#include "formats/bfloat16.h"
#include "formats/float16.h"
#include "formats/float32.h"
#include "formats/float64.h"
#include "rules/math.h"
#include "target.h"

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

namespace onepass::inline ONEPASS_TARGET {

template <class T>
inline constexpr std::int64_t kTile = 4096 / sizeof(T);

// Loads and stores that make no claim on alignment: tensors may begin at any byte.
template <class Storage>
struct Unaligned {
  using type [[gnu::aligned(1), gnu::may_alias]] = Storage;
};

template <class Codec>
auto* stored(std::byte* data) {
  return reinterpret_cast<typename Unaligned<typename Codec::Storage>::type*>(data);
}

template <class Codec, class T>
void decode_run(std::byte* from, std::int64_t stride, T* to, std::int64_t n) {
  const auto* source = stored<Codec>(from);
  if (stride == 1) {
    for (std::int64_t i = 0; i < n; ++i) to[i] = Codec::template decode<T>(source[i]);
  } else {
    for (std::int64_t i = 0; i < n; ++i) to[i] = Codec::template decode<T>(source[i * stride]);
  }
}

template <class Codec, class T>
void encode_run(const T* from, std::byte* to, std::int64_t stride, std::int64_t n) {
  auto* target = stored<Codec>(to);
  if (stride == 1) {
    for (std::int64_t i = 0; i < n; ++i) target[i] = Codec::template encode<T>(from[i]);
  } else {
    for (std::int64_t i = 0; i < n; ++i) target[i * stride] = Codec::template encode<T>(from[i]);
  }
}

#ifdef __AVX512BF16__
// The processor's own conversion, a tenth of the instructions. Its bits are the codec's: it rounds to nearest even,
// keeps the upper payload of a NaN, and takes denormals for zero, of which a step has none.
template <>
inline void encode_run<BFloat16, float>(const float* from, std::byte* to, std::int64_t stride, std::int64_t n) {
  auto* target = stored<BFloat16>(to);
  std::int64_t i = 0;
  if (stride == 1)
    for (; i + 32 <= n; i += 32) {
      const auto pair = _mm512_cvtne2ps_pbh(_mm512_loadu_ps(from + i + 16), _mm512_loadu_ps(from + i));
      _mm512_storeu_si512(target + i, std::bit_cast<__m512i>(pair));
    }
  for (; i < n; ++i) target[i * stride] = BFloat16::encode(from[i]);
}
#endif

// Calls visit(offset, stride, count) for the runs of elements that make up [begin, begin + n) of an operand, in order;
// offset and stride are in elements.
template <class Visit>
void for_each_run(const Layout* layout, std::size_t operand, std::int64_t begin, std::int64_t n, Visit&& visit) {
  if (layout == nullptr) {
    visit(begin, std::int64_t{1}, n);
    return;
  }
  const std::int64_t* shape = layout->shape.data();
  const std::int64_t* strides = layout->strides[operand].data();
  const auto inner = static_cast<std::int64_t>(layout->shape.size()) - 1;
  while (n > 0) {
    std::int64_t rest = begin;
    std::int64_t offset = 0;
    std::int64_t count = n;
    for (std::int64_t d = inner; d >= 0; --d) {
      const std::int64_t index = rest % shape[d];
      rest /= shape[d];
      offset += index * strides[d];
      if (d == inner && shape[d] - index < count) count = shape[d] - index;
    }
    visit(offset, strides[inner], count);
    begin += count;
    n -= count;
  }
}

// Elements [begin, begin + n) of an operand, decoded into a tile.
template <class T>
void decode(const Operand& source, const Layout* layout, std::size_t operand, std::int64_t begin, std::int64_t n,
            T* tile) {
  for_each_run(layout, operand, begin, n, [&](std::int64_t offset, std::int64_t stride, std::int64_t count) {
    std::byte* from = source.data + offset * static_cast<std::int64_t>(size_of(source.format));
    switch (source.format) {
#define ONEPASS_X(name, Type)                    \
  case Format::name:                             \
    decode_run<Type>(from, stride, tile, count); \
    break;
      ONEPASS_FORMATS(ONEPASS_X)
#undef ONEPASS_X
    }
    tile += count;
  });
}

// The way back.
template <class T>
void encode(const Operand& target, const Layout* layout, std::size_t operand, std::int64_t begin, std::int64_t n,
            const T* tile) {
  for_each_run(layout, operand, begin, n, [&](std::int64_t offset, std::int64_t stride, std::int64_t count) {
    std::byte* to = target.data + offset * static_cast<std::int64_t>(size_of(target.format));
    switch (target.format) {
#define ONEPASS_X(name, Type)                  \
  case Format::name:                           \
    encode_run<Type>(tile, to, stride, count); \
    break;
      ONEPASS_FORMATS(ONEPASS_X)
#undef ONEPASS_X
    }
    tile += count;
  });
}

template <class T>
constexpr Format native_format() {
  return sizeof(T) == 4 ? Format::float32 : Format::float64;
}

// Whether a packed operand is a plain array of T.
template <class T>
bool is_plain_array(const Operand& operand) {
  return operand.format == native_format<T>() && reinterpret_cast<std::uintptr_t>(operand.data) % sizeof(T) == 0;
}

// The rule over n elements of plain arrays. States that are not in `Set` read as zero, and what the rule makes of them
// is dropped; being constants, they cost nothing. Operands may be one and the same array (a gradient that is the
// parameter); they never overlap otherwise, which is what `ivdep` promises the vectoriser.
template <class Rule, class T, unsigned Set, std::size_t... State>
ONEPASS_INLINE void apply(const typename Rule::template Constants<T>& constants, T factor, T* const* arrays,
                          std::int64_t n, std::index_sequence<State...> /*states*/) {
  T* param = arrays[kParam];
  const T* grad = arrays[kGrad];
  [[maybe_unused]] T* const states[] = {arrays[kFirstState + State]..., nullptr};
#pragma GCC ivdep
  for (std::int64_t i = 0; i < n; ++i) {
    T p = param[i];
    [[maybe_unused]] T s[] = {((Set >> State & 1) != 0 ? states[State][i] : T(0))..., T(0)};
    Rule::update(constants, p, factor * grad[i], s[State]...);
    param[i] = p;
    (((Set >> State & 1) != 0 ? void(states[State][i] = s[State]) : void()), ...);
  }
}

// Lookahead (Zhang et al. 2019, arXiv:1907.08610, algorithm 1), the end of a cycle: the slow weights go a part of the
// way to where the rule has led the parameter, and the parameter begins anew from there. `param` holds elements
// [begin, begin + n). One function for all rules; a call for each tile is nothing beside the tile.
template <class T>
[[gnu::noinline]] void look_ahead(const Job& job, std::int64_t begin, std::int64_t n, T* param) {
  alignas(64) T tile[kTile<T>];
  const Operand& operand = job.operands[kSlow];
  const bool in_place = job.layout == nullptr && is_plain_array<T>(operand);
  T* slow = in_place ? reinterpret_cast<T*>(operand.data) + begin : tile;
  if (!in_place) decode(operand, job.layout, kSlow, begin, n, slow);
  const Average<T> towards(1.0 - job.blend, job.blend);
#pragma GCC ivdep
  for (std::int64_t i = 0; i < n; ++i) param[i] = slow[i] = towards(slow[i], param[i]);
  if (!in_place) encode(operand, job.layout, kSlow, begin, n, slow);
}

// Steps elements [begin, end) of a job that has this set of the rule's states.
template <class Rule, class T, unsigned Set>
void run_with(const Job& job, std::int64_t begin, std::int64_t end) {
  constexpr std::size_t operands = kFirstState + Rule::state_names.size();
  constexpr auto used = [](std::size_t k) { return k < kFirstState || (Set >> (k - kFirstState) & 1) != 0; };
  alignas(64) T tiles[operands][kTile<T>];
  bool in_place[operands];
  for (std::size_t k = 0; k < operands; ++k) in_place[k] = job.layout == nullptr && is_plain_array<T>(job.operands[k]);
  const auto constants = *static_cast<const typename Rule::template Constants<T>*>(job.constants);
  const T factor = static_cast<T>(job.grad_factor);

  for (std::int64_t at = begin; at < end; at += kTile<T>) {
    const std::int64_t n = end - at < kTile<T> ? end - at : kTile<T>;
    T* arrays[operands];
    for (std::size_t k = 0; k < operands; ++k) {
      arrays[k] = in_place[k] ? reinterpret_cast<T*>(job.operands[k].data) + at : tiles[k];
      if (used(k) && !in_place[k]) decode(job.operands[k], job.layout, k, at, n, arrays[k]);
    }
    apply<Rule, T, Set>(constants, factor, arrays, n, std::make_index_sequence<Rule::state_names.size()>{});
    if (job.operands[kSlow].data != nullptr) look_ahead(job, at, n, arrays[kParam]);
    for (std::size_t k = 0; k < operands; ++k)
      if (used(k) && k != kGrad && !in_place[k]) encode(job.operands[k], job.layout, k, at, n, arrays[k]);
  }
}

// Steps elements [begin, end) of a job: a kernel. The states that it has must be one of the rule's `state_sets`.
template <class Rule, class T>
void run(const Job& job, std::int64_t begin, std::int64_t end) {
  unsigned held = 0;
  for (std::size_t k = 0; k < Rule::state_names.size(); ++k)
    if (job.operands[kFirstState + k].data != nullptr) held |= 1U << k;
  [&]<std::size_t... I>(std::index_sequence<I...> /*sets*/) {
    ((held == Rule::state_sets[I] ? run_with<Rule, T, Rule::state_sets[I]>(job, begin, end) : void()), ...);
  }(std::make_index_sequence<Rule::state_sets.size()>{});
}

}  // namespace onepass::inline ONEPASS_TARGET
