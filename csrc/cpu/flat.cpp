#include "cpu/flat.h"

#include <algorithm>

#include "cpu/dispatch.h"
#include "cpu/fpmode.h"
#include "cpu/team.h"
#include "rules/math.h"

namespace onepass {
namespace {

// The sums of chunks are added up in order, independent of the threads. So chunks have a fixed size. Each group begins
// a new chunk, so that its sums do not depend on its neighbours.
constexpr std::int64_t kChunk = 16'384;

std::vector<Chunk> chunks_of(const Flat& flat) {
  std::vector<Chunk> chunks;
  std::int64_t at = 0;
  for (std::size_t group = 0; group < flat.ends.size(); ++group) {
    for (; at < flat.ends[group]; at += kChunk) chunks.push_back({at, std::min(at + kChunk, flat.ends[group]), group});
    at = flat.ends[group];
  }
  return chunks;
}

template <class Pass>
Found reduce(const Flat& flat, const Pass& pass, std::size_t width, PassKernel<Pass> kernel) {
  const std::vector<Chunk> chunks = chunks_of(flat);
  std::vector<double> sums(chunks.size() * width);
  std::vector<double> largest(chunks.size());
  const std::size_t groups = flat.ends.size();
  Found found{width, std::vector<double>(groups * width), std::vector<double>(groups)};  // before anything is written
  const std::int64_t bytes = flat.bytes(pass.vectors());
  on_team(team_size(bytes, flat.threads), [&](int index, int count) {
    const auto share = [&](int i) {
      return chunks.size() * static_cast<std::size_t>(i) / static_cast<std::size_t>(count);
    };
    for (std::size_t c = share(index); c < share(index + 1); ++c)
      kernel(pass, chunks[c], sums.data() + c * width, largest[c]);
  });

  const StepMode mode;
  for (std::size_t c = 0; c < chunks.size(); ++c) {
    const std::size_t group = chunks[c].group;
    for (std::size_t k = 0; k < width; ++k) found.sums[group * width + k] += sums[c * width + k];
    found.largest[group] = maximum(found.largest[group], largest[c]);
  }
  return found;
}

const PassKernels& kernels(const Flat& flat) { return active_isa().kernels.of_type(flat.wide).passes; }

}  // namespace

Found run(const Flat& flat, const Gather& pass) { return reduce(flat, pass, Gather::sums, kernels(flat).gather); }
Found run(const Flat& flat, const Distance& pass) { return reduce(flat, pass, Distance::sums, kernels(flat).distance); }
Found run(const Flat& flat, const Move& pass) { return reduce(flat, pass, Move::sums, kernels(flat).move); }
Found run(const Flat& flat, const Products& pass) {
  return reduce(flat, pass, Products::sums * pass.pairs.size(), kernels(flat).products);
}
Found run(const Flat& flat, const Combine& pass) { return reduce(flat, pass, Combine::sums, kernels(flat).combine); }

}  // namespace onepass
