// Followers: tensors that are updated from the new parameter while its tile is in the L1 cache, f += weight * (p - f).
// They are averages of the weights and, with weight 1, copies in another format. With sets_param, p = f afterwards:
// Lookahead's slow weights (Zhang et al. 2019, arXiv:1907.08610, algorithm 1).
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cpu/driver.h"
#include "cpu/master.h"
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
    const Follower& follower = job.followers.data()[i];
    const bool copies = follower.weight == 1.0;
    if (!in_place && !copies) decode(job, k, begin, n, values);
    const Format own = job.operands.data()[kParam].format;
    const bool has_master = job.master != Master::none;
    if (!has_master && !follower.sets_param && size_of(own) < sizeof(T)) round_to(own, param, n);
    const Average<T> towards(1.0 - follower.weight, follower.weight);
    if (copies) {
      std::memcpy(values, param, static_cast<std::size_t>(n) * sizeof(T));
      // A copy in the parameter's format has its bits.
      if constexpr (std::is_same_v<T, float>)
        if (has_master && operand.format == own && !follower.sets_param) round_master(job, values, n);
    } else if (follower.sets_param) {
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
