// The element-wise driver: one pass over a range of a tensor, in tiles that stay in the L1 cache.
//
// An operand that is stored in the arithmetic type and packed is used where it lies. Any other is decoded into a tile,
// and encoded back after the rule. So a rule meets only plain arrays, and formats and rules do not multiply.
//
// With a sparse gradient the range is one of the touched rows, laid end to end. Rows that are long are used where they
// lie, short ones collected in the tile; the gradient's entries for a row are added up on their way into the tile.
#pragma once

#include <cstdint>
#include <utility>

#include "cpu/rows.h"
#include "formats/bfloat16.h"
#include "formats/float16.h"
#include "formats/float32.h"
#include "formats/float64.h"
#include "job.h"
#include "rules/math.h"
#include "target.h"

#ifdef __F16C__
#include <immintrin.h>
#endif

namespace onepass::inline ONEPASS_TARGET {

// Tiles are small, for those of all operands share the L1 cache with what is fetched ahead. Memory is asked for two of
// them ahead. The processor itself would follow arrays that are read in order, but loses them at the end of each page,
// and stops while it decodes and computes; so asked, 16-bit formats took 0.6 to 0.8 of the time, float32 0.8 to 0.95.
template <class T>
inline constexpr std::int64_t kTile = 1024 / sizeof(T);
inline constexpr std::int64_t kTilesAhead = 2;
inline constexpr std::int64_t kLine = 64;

// Rows of this length are worth a tile of their own: from here on it is faster than to copy them.
inline constexpr std::int64_t kLongRow = 64;
inline constexpr std::int64_t kRowsAhead = 4;

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

// The processor's own conversions, where it has them: a tenth of the instructions. Their bits are the codecs': they
// round to nearest even, keep a NaN's sign and upper payload, and make it quiet. Float32's denormals, which a step does
// not have, would be zero; those of float16 survive whatever the mode.
#ifdef __F16C__
#ifdef __AVX512F__
inline constexpr __mmask16 kAll = 0xffff;  // gcc 12 warns of its own header where these have no mask; it drops this one
#endif

template <>
inline void decode_run<Float16, float>(std::byte* from, std::int64_t stride, float* to, std::int64_t n) {
  const auto* source = stored<Float16>(from);
  std::int64_t i = 0;
  if (stride == 1) {
#ifdef __AVX512F__
    for (; i + 16 <= n; i += 16)
      _mm512_storeu_ps(to + i,
                       _mm512_maskz_cvtph_ps(kAll, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(source + i))));
#endif
    for (; i + 8 <= n; i += 8)
      _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(source + i))));
  }
  for (; i < n; ++i) to[i] = Float16::decode<float>(source[i * stride]);
}

template <>
inline void encode_run<Float16, float>(const float* from, std::byte* to, std::int64_t stride, std::int64_t n) {
  auto* target = stored<Float16>(to);
  std::int64_t i = 0;
  if (stride == 1) {
#ifdef __AVX512F__
    for (; i + 16 <= n; i += 16) {
      const __m256i encoded =
          _mm512_maskz_cvtps_ph(kAll, _mm512_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(target + i), encoded);
    }
#endif
    for (; i + 8 <= n; i += 8) {
      const __m128i encoded = _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(target + i), encoded);
    }
  }
  for (; i < n; ++i) target[i * stride] = Float16::encode(from[i]);
}
#endif

#ifdef __AVX512BF16__
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

// The number that row r of those that are touched has in the parameter.
inline std::int64_t row_number(const Rows& rows, std::int64_t r) {
  return rows.entries.data()[rows.first.data()[r]].row;
}

// Calls visit(offset, stride, count) for the runs of elements that make up [begin, begin + n) of an operand, in order;
// offset and stride are in elements. Either of rows and layout, or none.
template <class Visit>
void for_each_run(const Rows* rows, const Layout* layout, std::size_t operand, std::int64_t begin, std::int64_t n,
                  Visit&& visit) {
  for (std::int64_t r = rows != nullptr ? begin / rows->length : 0; n > 0; ++r) {
    std::int64_t offset = begin;
    std::int64_t stride = 1;
    std::int64_t count = n;
    if (rows != nullptr) {
      const std::int64_t column = begin - r * rows->length;
      offset = row_number(*rows, r) * rows->length + column;
      if (rows->length - column < count) count = rows->length - column;
    } else if (layout != nullptr) {
      const auto inner = static_cast<std::int64_t>(layout->shape.size()) - 1;
      const std::int64_t* shape = layout->shape.data();
      const std::int64_t* strides = layout->strides[operand].data();
      std::int64_t rest = begin;
      offset = 0;
      stride = strides[inner];
      for (std::int64_t d = inner; d >= 0; --d) {
        const std::int64_t index = rest % shape[d];
        rest /= shape[d];
        offset += index * strides[d];
        if (d == inner && shape[d] - index < count) count = shape[d] - index;
      }
    }
    visit(offset, stride, count);
    begin += count;
    n -= count;
  }
}

// Elements of an operand, whatever its format, to and from a plain array; offset and stride are in elements.
template <class T>
void read_run(const Operand& source, std::int64_t offset, std::int64_t stride, T* to, std::int64_t n) {
  std::byte* from = source.data + offset * static_cast<std::int64_t>(size_of(source.format));
  switch (source.format) {
#define ONEPASS_X(name, Type) \
  case Format::name:          \
    return decode_run<Type>(from, stride, to, n);
    ONEPASS_FORMATS(ONEPASS_X)
#undef ONEPASS_X
  }
}

template <class T>
void write_run(const Operand& target, std::int64_t offset, std::int64_t stride, const T* from, std::int64_t n) {
  std::byte* to = target.data + offset * static_cast<std::int64_t>(size_of(target.format));
  switch (target.format) {
#define ONEPASS_X(name, Type) \
  case Format::name:          \
    return encode_run<Type>(from, to, stride, n);
    ONEPASS_FORMATS(ONEPASS_X)
#undef ONEPASS_X
  }
}

// The same for elements [begin, begin + n) of an operand that is packed or has a layout.
template <class T>
void decode(const Operand& source, const Layout* layout, std::size_t operand, std::int64_t begin, std::int64_t n,
            T* tile) {
  for_each_run(nullptr, layout, operand, begin, n, [&](std::int64_t offset, std::int64_t stride, std::int64_t count) {
    read_run(source, offset, stride, tile, count);
    tile += count;
  });
}

template <class T>
void encode(const Operand& target, const Layout* layout, std::size_t operand, std::int64_t begin, std::int64_t n,
            const T* tile) {
  for_each_run(nullptr, layout, operand, begin, n, [&](std::int64_t offset, std::int64_t stride, std::int64_t count) {
    write_run(target, offset, stride, tile, count);
    tile += count;
  });
}

// Asks for row number r of those that are touched, which lies where no processor would look for it. Once a row has been
// begun, its rest comes by itself.
ONEPASS_INLINE void prefetch_row(const Job& job, std::int64_t r) {
  constexpr std::int64_t kBeginning = 4 * kLine;
  const Rows::Entry& entry = job.rows->entries.data()[job.rows->first.data()[r]];
  for (std::size_t k = 0; k < kMaxOperands; ++k) {
    const Operand& operand = job.operands[k];
    if (operand.data == nullptr) continue;
    const std::int64_t bytes = job.rows->length * static_cast<std::int64_t>(size_of(operand.format));
    const std::byte* row = operand.data + (k == kGrad ? entry.position : entry.row) * bytes;
    for (std::int64_t b = 0; b < bytes && b < kBeginning; b += kLine) __builtin_prefetch(row + b);
  }
}

// The gradient of rows: for each the sum of its entries, in the order in which they came.
template <class Codec, class T>
void decode_sums(const Job& job, std::int64_t begin, std::int64_t n, T* tile) {
  const Rows& rows = *job.rows;
  const Rows::Entry* entries = rows.entries.data();
  const std::int64_t* first = rows.first.data();
  const auto* values = stored<Codec>(job.operands[kGrad].data);
  const std::int64_t foreseen = rows.length >= kLongRow ? rows.count() - kRowsAhead : 0;
  std::int64_t column = begin % rows.length;
  for (std::int64_t r = begin / rows.length; n > 0; ++r) {
    if (r < foreseen) prefetch_row(job, r + kRowsAhead);
    const std::int64_t count = rows.length - column < n ? rows.length - column : n;
    const auto* value = values + entries[first[r]].position * rows.length + column;
    for (std::int64_t i = 0; i < count; ++i) tile[i] = Codec::template decode<T>(value[i]);
    for (std::int64_t e = first[r] + 1; e < first[r + 1]; ++e) {
      value = values + entries[e].position * rows.length + column;
      for (std::int64_t i = 0; i < count; ++i) tile[i] += Codec::template decode<T>(value[i]);
    }
    tile += count;
    n -= count;
    column = 0;
  }
}

template <class Codec, class T>
void decode_as(const Job& job, std::size_t operand, std::int64_t begin, std::int64_t n, T* tile) {
  if (job.rows != nullptr && operand == kGrad) return decode_sums<Codec>(job, begin, n, tile);
  std::byte* const from = job.operands[operand].data;
  for_each_run(job.rows, job.layout, operand, begin, n,
               [&](std::int64_t offset, std::int64_t stride, std::int64_t count) {
                 decode_run<Codec>(from + offset * std::int64_t{sizeof(typename Codec::Storage)}, stride, tile, count);
                 tile += count;
               });
}

template <class Codec, class T>
void encode_as(const Job& job, std::size_t operand, std::int64_t begin, std::int64_t n, const T* tile) {
  std::byte* const to = job.operands[operand].data;
  for_each_run(job.rows, job.layout, operand, begin, n,
               [&](std::int64_t offset, std::int64_t stride, std::int64_t count) {
                 encode_run<Codec>(tile, to + offset * std::int64_t{sizeof(typename Codec::Storage)}, stride, count);
                 tile += count;
               });
}

template <class T>
void decode(const Job& job, std::size_t operand, std::int64_t begin, std::int64_t n, T* tile) {
  switch (job.operands[operand].format) {
#define ONEPASS_X(name, Type) \
  case Format::name:          \
    return decode_as<Type>(job, operand, begin, n, tile);
    ONEPASS_FORMATS(ONEPASS_X)
#undef ONEPASS_X
  }
}

template <class T>
void encode(const Job& job, std::size_t operand, std::int64_t begin, std::int64_t n, const T* tile) {
  switch (job.operands[operand].format) {
#define ONEPASS_X(name, Type) \
  case Format::name:          \
    return encode_as<Type>(job, operand, begin, n, tile);
    ONEPASS_FORMATS(ONEPASS_X)
#undef ONEPASS_X
  }
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

// Updates elements [begin, begin + n) of a job's followers. `param` holds these elements of the parameter
// (followers.h).
template <class T>
void follow(const Job& job, std::int64_t begin, std::int64_t n, T* param);

inline bool has_followers(const Job& job) {
  const Operand* operands = job.operands.data();
  for (std::size_t k = kFirstFollower; k < kMaxOperands; ++k)
    if (operands[k].data != nullptr) return true;
  return false;
}

// Asks for elements [begin, begin + n) of a packed operand.
ONEPASS_INLINE void prefetch(const Operand& operand, std::int64_t begin, std::int64_t n) {
  const auto size = static_cast<std::int64_t>(size_of(operand.format));
  const std::byte* from = operand.data + begin * size;
  for (std::int64_t b = 0; b < n * size; b += kLine) __builtin_prefetch(from + b);
}

// Steps elements [begin, end) of a job that has this set of the rule's states.
template <class Rule, class T, unsigned Set>
void run_with(const Job& job, std::int64_t begin, std::int64_t end) {
  constexpr std::size_t operands = kFirstState + Rule::state_names.size();
  constexpr auto used = [](std::size_t k) { return k < kFirstState || (Set >> (k - kFirstState) & 1) != 0; };
  alignas(64) T tiles[operands][kTile<T>];
  bool in_place[operands];
  const bool packed = job.rows == nullptr && job.layout == nullptr;
  const bool long_rows = job.rows != nullptr && job.rows->length >= kLongRow;
  for (std::size_t k = 0; k < operands; ++k)
    in_place[k] = (packed || (long_rows && k != kGrad)) && is_plain_array<T>(job.operands[k]);
  const auto constants = *static_cast<const typename Rule::template Constants<T>*>(job.constants);
  const T factor = static_cast<T>(job.grad_factor);
  const bool followed = has_followers(job);

  std::int64_t n = 0;
  for (std::int64_t at = begin; at < end; at += n) {
    n = end - at < kTile<T> ? end - at : kTile<T>;
    std::int64_t offset = at;  // of the element in operands that are used in place
    if (long_rows) {
      const std::int64_t column = at % job.rows->length;
      offset = row_number(*job.rows, at / job.rows->length) * job.rows->length + column;
      if (job.rows->length - column < n) n = job.rows->length - column;
    }
    if (packed && at + (kTilesAhead + 1) * kTile<T> <= end)
      for (std::size_t k = 0; k < operands; ++k)
        if (used(k)) prefetch(job.operands[k], at + kTilesAhead * kTile<T>, kTile<T>);
    T* arrays[operands];
    for (std::size_t k = 0; k < operands; ++k) {
      arrays[k] = in_place[k] ? reinterpret_cast<T*>(job.operands[k].data) + offset : tiles[k];
      if (used(k) && !in_place[k]) decode(job, k, at, n, arrays[k]);
    }
    apply<Rule, T, Set>(constants, factor, arrays, n, std::make_index_sequence<Rule::state_names.size()>{});
    if (followed) follow(job, at, n, arrays[kParam]);
    for (std::size_t k = 0; k < operands; ++k)
      if (used(k) && k != kGrad && !in_place[k]) encode(job, k, at, n, arrays[k]);
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
