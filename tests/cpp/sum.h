// The reference of sums over blocks.
#pragma once

#include <algorithm>

namespace onepass::testing {

// A sum as cpu/sums.h and its users define it: lanes of a tile, tiles of a chunk, chunks in order.
class Sum {
 public:
  void add(double value) {
    lanes_[in_tile_ % 32] += value;
    if (++in_tile_ == 1024) end_tile();
    if (++in_chunk_ == 16'384) end_chunk();
  }
  double total() {
    end_chunk();
    return total_;
  }

 private:
  void end_tile() {
    for (int half = 16; half > 0; half /= 2)
      for (int lane = 0; lane < half; ++lane) lanes_[lane] += lanes_[lane + half];
    chunk_ += lanes_[0];
    std::ranges::fill(lanes_, 0.0);
    in_tile_ = 0;
  }
  void end_chunk() {
    if (in_tile_ > 0) end_tile();
    total_ += chunk_;
    chunk_ = 0.0;
    in_chunk_ = 0;
  }

  double lanes_[32] = {};
  double chunk_ = 0.0;
  double total_ = 0.0;
  int in_tile_ = 0;
  int in_chunk_ = 0;
};

}  // namespace onepass::testing
