// Followers: tensors that are updated from the new parameter while its tile is in the L1 cache, f += weight * (p - f).
// With sets_param, p = f afterwards: Lookahead's slow weights (Zhang et al. 2019, arXiv:1907.08610, algorithm 1).
#pragma once

#include <cstdint>

#include "cpu/driver.h"
#include "job.h"
#include "rules/math.h"
#include "target.h"

namespace onepass::inline ONEPASS_TARGET {

// One function for all rules: the cost of a call is negligible beside a tile.
template <class T>
[[gnu::noinline]] void follow(const Job& job, std::int64_t begin, std::int64_t n, T* param) {
  alignas(64) T tile[kTile<T>];
  for (std::size_t i = 0; i < kMaxFollowers; ++i) {
    const std::size_t k = kFirstFollower + i;
    const Operand& operand = job.operands.data()[k];
    if (operand.data == nullptr) continue;
    const bool in_place = job.rows == nullptr && job.layout == nullptr && is_plain_array<T>(operand);
    T* values = in_place ? reinterpret_cast<T*>(operand.data) + begin : tile;
    if (!in_place) decode(job, k, begin, n, values);
    const Follower& follower = job.followers.data()[i];
    const Average<T> towards(1.0 - follower.weight, follower.weight);
    if (follower.sets_param) {
#pragma GCC ivdep
      for (std::int64_t j = 0; j < n; ++j) param[j] = values[j] = towards(values[j], param[j]);
    } else {
#pragma GCC ivdep
      for (std::int64_t j = 0; j < n; ++j) values[j] = towards(values[j], param[j]);
    }
    if (!in_place) encode(job, k, begin, n, values);
  }
}

}  // namespace onepass::inline ONEPASS_TARGET
