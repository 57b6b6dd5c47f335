// Decodes and encodes tiles of a job's operands, for every format, layout and sparse gradient.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cpu/apply.h"
#include "cpu/convert.h"
#include "cpu/rows.h"
#include "cpu/runs.h"
#include "formats/with_format.h"
#include "job.h"
#include "target.h"

namespace onepass::inline ONEPASS_TARGET {

// Rows of at least this many elements are faster in place than copied to a tile.
inline constexpr std::int64_t kLongRow = 64;
inline constexpr std::int64_t kRowsAhead = 4;

// Prefetches the beginning of touched row r, whose address no hardware prefetcher can predict. The rest of a row is
// read in order, which they predict.
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

// Decodes the gradient of rows: for each row the sum of its entries, in the gradient's order.
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
  with_format(job.operands[operand].format,
              [&]<class Codec>(Codec) { decode_as<Codec>(job, operand, begin, n, tile); });
}

template <class T>
void encode(const Job& job, std::size_t operand, std::int64_t begin, std::int64_t n, const T* tile) {
  with_format(job.operands[operand].format,
              [&]<class Codec>(Codec) { encode_as<Codec>(job, operand, begin, n, tile); });
}

}  // namespace onepass::inline ONEPASS_TARGET
