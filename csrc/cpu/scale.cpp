#include "cpu/scale.h"

#include <algorithm>
#include <vector>

#include "cpu/dispatch.h"
#include "cpu/team.h"

namespace onepass {
namespace {

constexpr std::int64_t kBlock = 65'536;  // elements
// Work is counted in bytes. The fixed cost of a tensor is counted as this many bytes.
constexpr std::int64_t kJobOverhead = 512;

struct Block {
  const Job* job;
  std::int64_t begin;
  std::int64_t past_bytes;  // bytes of all blocks up to the end of this one
};

// Returns the bytes that scaling reads and writes.
std::int64_t bytes_of(const Job& job, std::int64_t elements) {
  return 2 * elements * static_cast<std::int64_t>(size_of(job.operands[kGrad].format));
}

}  // namespace

int scale_team(std::span<const Job> jobs, int threads) {
  std::int64_t bytes = 0;
  for (const Job& job : jobs) bytes += kJobOverhead + bytes_of(job, job.length);
  return team_size(bytes, threads);
}

void scale_gradients(std::span<const Job> jobs, int threads) {
  std::vector<Block> blocks;
  blocks.reserve(jobs.size());
  std::int64_t bytes = 0;
  for (const Job& job : jobs) {
    for (std::int64_t begin = 0; begin < job.length; begin += kBlock) {
      bytes += (begin == 0 ? kJobOverhead : 0) + bytes_of(job, std::min(kBlock, job.length - begin));
      blocks.push_back({&job, begin, bytes});
    }
  }
  const Kernels& kernels = *active_isa().kernels;
  on_team(scale_team(jobs, threads), [&](int index, int count) {
    // A block belongs to the thread in whose share of the bytes it ends.
    const auto share = [&](int i) {
      return std::ranges::upper_bound(blocks, bytes / count * i, {}, &Block::past_bytes) - blocks.begin();
    };
    const auto first = share(index);
    const auto past = index + 1 < count ? share(index + 1) : static_cast<std::ptrdiff_t>(blocks.size());
    for (auto b = first; b < past; ++b) {
      const Block& block = blocks[static_cast<std::size_t>(b)];
      const ScaleKernel kernel = block.job->wide ? kernels.scale_wide : kernels.scale_narrow;
      kernel(*block.job, block.begin, std::min(block.begin + kBlock, block.job->length));
    }
  });
}

}  // namespace onepass
