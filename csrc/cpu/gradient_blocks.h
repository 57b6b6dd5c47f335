// Work on gradients (operand kGrad of jobs), divided into blocks of a fixed number of elements.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "cpu/team.h"
#include "job.h"

namespace onepass {

struct GradientBlock {
  const Job* job;
  std::int64_t begin, end;
  std::int64_t past_bytes;  // bytes of all blocks up to the end of this one
};

class GradientBlocks {
 public:
  // Each element is read or written `passes` times. With `only`, the other jobs have no blocks.
  GradientBlocks(std::span<const Job> jobs, std::int64_t elements, int passes, bool Job::* only = nullptr) {
    blocks_.reserve(jobs.size());
    for (const Job& job : jobs) {
      if (only != nullptr && !(job.*only)) continue;
      const std::int64_t size = passes * static_cast<std::int64_t>(size_of(job.operands[kGrad].format));
      for (std::int64_t begin = 0; begin < job.length; begin += elements) {
        const std::int64_t end = std::min(begin + elements, job.length);
        bytes_ += (begin == 0 ? kJobOverhead : 0) + size * (end - begin);
        blocks_.push_back({&job, begin, end, bytes_});
      }
    }
  }

  const std::vector<GradientBlock>& all() const { return blocks_; }

  // Returns how many of at most `threads` threads to use.
  int team(int threads) const { return team_size(bytes_, threads); }

  // Calls work(number, block) for each block, on these threads.
  template <class Work>
  void run(int threads, Work&& work) const {
    on_team(team(threads), [&](int index, int count) {
      // A block belongs to the thread in whose share of the bytes it ends.
      const auto share = [&](int i) {
        if (i == count) return blocks_.size();
        const auto past = std::ranges::upper_bound(blocks_, bytes_ / count * i, {}, &GradientBlock::past_bytes);
        return static_cast<std::size_t>(past - blocks_.begin());
      };
      for (std::size_t b = share(index); b < share(index + 1); ++b) work(b, blocks_[b]);
    });
  }

 private:
  static constexpr std::int64_t kJobOverhead = 512;  // the fixed cost of a tensor, in bytes

  std::vector<GradientBlock> blocks_;
  std::int64_t bytes_ = 0;
};

}  // namespace onepass
