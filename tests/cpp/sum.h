// The reference of sums over blocks.
#pragma once

#include <algorithm>

namespace onepass::testing {

// A sum as cpu/sums.h and its users define it: lanes of a run, runs of a chunk, chunks in order.
class Sum {
 public:
  explicit Sum(int run = kTile) : run_(run) {}
  void add(double value) {
    lanes_[in_run_ % 32] += value;
    if (++in_run_ == run_) end_run();
    if (++in_chunk_ == kChunk) end_chunk();
  }
  double total() {
    end_chunk();
    return total_;
  }

  static constexpr int kTile = 1024;
  static constexpr int kChunk = 16'384;

 private:
  void end_run() {
    for (int half = 16; half > 0; half /= 2)
      for (int lane = 0; lane < half; ++lane) lanes_[lane] += lanes_[lane + half];
    chunk_ += lanes_[0];
    std::ranges::fill(lanes_, 0.0);
    in_run_ = 0;
  }
  void end_chunk() {
    if (in_run_ > 0) end_run();
    total_ += chunk_;
    chunk_ = 0.0;
    in_chunk_ = 0;
  }

  double lanes_[32] = {};
  double chunk_ = 0.0;
  double total_ = 0.0;
  int run_;
  int in_run_ = 0;
  int in_chunk_ = 0;
};

}  // namespace onepass::testing
