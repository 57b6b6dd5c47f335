// Master weights: a 16-bit parameter that is stepped as the float32 number of which it is the rounded copy.
//
// With a whole master, the copy is rounded to nearest, ties to even. If it is not the rounded master when a step
// begins, the user has changed the parameter, and the master becomes the parameter.
//
// With low bits, the master is the parameter's 16 bits followed by 16 zeros, plus the low bits as a signed number. So
// the low bits are those of the master, and the parameter is the master rounded to nearest, ties away from zero. Ties
// to even would be ambiguous: both ties beside an even parameter would have the same 32 bits. Every finite number and
// infinity is restored exactly, also one that rounds to infinity. A NaN becomes quiet and keeps its upper payload.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cpu/convert.h"
#include "cpu/runs.h"
#include "cpu/tile.h"
#include "formats/bfloat16.h"
#include "formats/low_bits.h"
#include "job.h"
#include "target.h"

namespace onepass::inline ONEPASS_TARGET {

// Rounds a tile to a format.
template <class T>
void round_to(Format format, T* tile, std::int64_t n) {
  alignas(64) std::byte stored[kTile<T> * sizeof(T)];
  const Operand copy{stored, format};
  write_run(copy, 0, 1, tile, n);
  read_run(copy, 0, 1, tile, n);
}

// Rounds a tile of masters to the parameter.
inline void round_master(const Job& job, float* tile, std::int64_t n) {
  if (job.master != Master::low_bits) return round_to(job.operands.data()[kParam].format, tile, n);
  for (std::int64_t i = 0; i < n; ++i) tile[i] = BFloat16::decode<float>(LowBits::high_of(tile[i]));
}

// 16 bits in memory, at any address.
using Half = Unaligned<std::uint16_t>::type;

// Calls visit(half, stride, tile, count) for each run of elements [begin, begin + n) of an operand of 16 bits: the low
// bits, or the parameter.
template <class Visit>
void for_each_run_of_halves(const Job& job, std::size_t operand, std::int64_t begin, std::int64_t n, float* tile,
                            Visit&& visit) {
  auto* const halves = reinterpret_cast<Half*>(job.operands.data()[operand].data);
  for_each_run(job.rows, job.layout, operand, begin, n,
               [&](std::int64_t offset, std::int64_t stride, std::int64_t count) {
                 visit(halves + offset, stride, tile, count);
                 tile += count;
               });
}

// Writes half_of(master) of a tile of masters to an operand of 16 bits.
template <class HalfOf>
void write_halves(const Job& job, std::size_t operand, std::int64_t begin, std::int64_t n, float* tile,
                  HalfOf&& half_of) {
  for_each_run_of_halves(job, operand, begin, n, tile,
                         [&](Half* to, std::int64_t stride, const float* from, std::int64_t count) {
                           if (stride == 1) {
                             for (std::int64_t i = 0; i < count; ++i) to[i] = half_of(from[i]);
                           } else {
                             for (std::int64_t i = 0; i < count; ++i) to[i * stride] = half_of(from[i]);
                           }
                         });
}

// Replaces a tile of the parameter by the masters of elements [begin, begin + n).
[[gnu::noinline]] inline void read_master(const Job& job, std::int64_t begin, std::int64_t n, float* tile) {
  if (job.master == Master::low_bits) {
    for_each_run_of_halves(job, kMaster, begin, n, tile,
                           [](const Half* low, std::int64_t stride, float* own, std::int64_t count) {
                             if (stride == 1) {
                               for (std::int64_t i = 0; i < count; ++i) own[i] = LowBits::join(own[i], low[i]);
                             } else {
                               for (std::int64_t i = 0; i < count; ++i) own[i] = LowBits::join(own[i], low[i * stride]);
                             }
                           });
    return;
  }
  alignas(64) float master[kTile<float>];
  alignas(64) float rounded[kTile<float>];
  alignas(64) std::byte stored[kTile<float> * sizeof(std::uint16_t)];
  const Operand copy{stored, job.operands.data()[kParam].format};
  decode(job, kMaster, begin, n, master);
  write_run(copy, 0, 1, master, n);
  read_run(copy, 0, 1, rounded, n);
  for (std::int64_t i = 0; i < n; ++i) tile[i] = is_copy(tile[i], rounded[i]) ? master[i] : tile[i];
}

// Writes a tile of masters, as parameter and master, to elements [begin, begin + n).
[[gnu::noinline]] inline void write_master(const Job& job, std::int64_t begin, std::int64_t n, float* tile) {
  if (job.master == Master::low_bits) {
    write_halves(job, kMaster, begin, n, tile, [](float master) { return LowBits::low_of(master); });
    write_halves(job, kParam, begin, n, tile, [](float master) { return LowBits::high_of(master); });
  } else {
    encode(job, kMaster, begin, n, tile);
    encode(job, kParam, begin, n, tile);
  }
}

}  // namespace onepass::inline ONEPASS_TARGET
