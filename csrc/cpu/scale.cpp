#include "cpu/scale.h"

#include "cpu/dispatch.h"
#include "cpu/gradient_blocks.h"

namespace onepass {
namespace {

constexpr std::int64_t kScaleBlock = 65'536;  // elements

GradientBlocks blocks_of(std::span<const Job> jobs) { return GradientBlocks(jobs, kScaleBlock, 2); }

}  // namespace

int scale_team(std::span<const Job> jobs, int threads) { return blocks_of(jobs).team(threads); }

void scale_gradients(std::span<const Job> jobs, int threads) {
  const Kernels& kernels = active_isa().kernels;
  blocks_of(jobs).run(threads, [&](std::size_t, const GradientBlock& block) {
    const ScaleKernel kernel = kernels.of_type(block.job->wide).scale;
    kernel(*block.job, block.begin, block.end);
  });
}

}  // namespace onepass
