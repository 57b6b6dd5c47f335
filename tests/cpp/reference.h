// A step by its definition, element by element. The kernels must have the same bits.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>
#include <numeric>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "cases.h"
#include "formats/with_format.h"
#include "job.h"
#include "layout.h"

namespace onepass::testing {

// -- memory ----------------------------------------------------------------------------------------------------------

// The address sanitizer guards the end of a block better than guard bytes, because it detects reads, too.
inline constexpr std::size_t kGuardBefore = 64;
#if defined(ONEPASS_ADDRESS_SANITIZER)
inline constexpr std::size_t kGuardAfter = 0;
#else
inline constexpr std::size_t kGuardAfter = 64;
#endif

// Bytes that begin at a cache line.
class Memory {
 public:
  Memory() = default;
  explicit Memory(std::size_t size)
      : size_(size), bytes_(static_cast<std::byte*>(::operator new(size, std::align_val_t{64}))) {
    std::memset(data(), 0xa5, size);
  }
  Memory(const Memory& other) : Memory(other.size_) { std::copy_n(other.data(), size_, data()); }
  Memory(Memory&&) = default;
  Memory& operator=(Memory other) {
    std::swap(size_, other.size_);
    std::swap(bytes_, other.bytes_);
    return *this;
  }

  std::byte* data() const { return bytes_.get(); }
  std::size_t size() const { return size_; }

 private:
  struct Free {
    void operator()(std::byte* bytes) const { ::operator delete(bytes, std::align_val_t{64}); }
  };
  std::size_t size_ = 0;
  std::unique_ptr<std::byte[], Free> bytes_;
};

// One operand with guards around it, and its elements placed by the strides.
struct Tensor {
  Format format = Format::float32;
  std::vector<std::int64_t> strides;  // in elements
  std::size_t first = 0;              // position of element 0 in memory
  Memory memory;

  std::byte* at(std::int64_t offset) {
    return memory.data() + first + static_cast<std::size_t>(offset) * size_of(format);
  }
};

template <class Codec, class T>
T load(const std::byte* from) {
  typename Codec::Storage stored;
  std::memcpy(&stored, from, sizeof stored);
  return Codec::template decode<T>(stored);
}

template <class Codec, class T>
void store(std::byte* to, T value) {
  const typename Codec::Storage stored = Codec::template encode<T>(value);
  std::memcpy(to, &stored, sizeof stored);
}

template <class T>
T load(Tensor& tensor, std::int64_t offset) {
  return with_format(tensor.format, [&]<class Codec>(Codec) { return load<Codec, T>(tensor.at(offset)); });
}

template <class T>
void store(Tensor& tensor, std::int64_t offset, T value) {
  with_format(tensor.format, [&]<class Codec>(Codec) { store<Codec, T>(tensor.at(offset), value); });
}

// -- problems --------------------------------------------------------------------------------------------------------

inline std::uint64_t scramble(std::uint64_t x) {
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9U;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebU;
  return x ^ (x >> 31);
}

// Values between 2^-6 and 2, of both signs, including some zeros and denormals of each format.
double number(std::uint64_t seed);

// Follower i, if there is one.
using Followers = std::array<std::optional<Follower>, kMaxFollowers>;

struct Spec {
  std::array<Format, kMaxOperands> formats{};  // float32
  bool wide = false;
  double grad_factor = 1.0;
  std::size_t misalignment = 0;                        // bytes from the beginning of a cache line to the parameter,
  std::size_t stagger = 0;                             // and by how much more for each further operand,
  std::array<std::size_t, kMaxOperands> ahead{};       // and elements before each of them
  std::array<std::vector<std::int64_t>, 3> strides{};  // of parameter, gradient, and every state; empty: packed
  double clip_value = kNoLimit;
  bool zeroes_grad = false;
  Followers followers{};         // the first has the states' strides, the second the parameter's
  Master master = Master::none;  // it has the states' strides, and a format of its own
};

// Each follower alone at either position, and two in every order of flags, with weights from 0 to 1.
std::vector<Followers> all_followers();

// Some of them, for tests that do not depend on the weights.
inline const Followers kFollowers[] = {
    {Follower{0.3, true}},
    {std::nullopt, Follower{0.7, false}},
    {Follower{0.3, true}, Follower{0.8, false}},
    {Follower{0.8, false}, Follower{0.3, true}},
    {Follower{0.7, false}, Follower{0.4, false}},
    {Follower{0.6, true}, Follower{0.2, true}},
};

inline std::array<Format, kMaxOperands> all_of(Format format) {
  std::array<Format, kMaxOperands> formats;
  formats.fill(format);
  return formats;
}

inline Format native(bool wide) { return wide ? Format::float64 : Format::float32; }

struct View {
  std::string_view what;
  std::vector<std::int64_t> shape;
  std::array<std::vector<std::int64_t>, 3> strides;  // of parameter, gradient and states; empty: packed
};

inline const View kViews[] = {
    {"scalar", {}, {}},
    {"transposed parameter", {40, 30}, {{{1, 40}, {}, {}}}},
    {"transposed, all of them", {40, 30}, {{{1, 40}, {1, 40}, {1, 40}}}},
    {"transposed gradient", {33, 70}, {{{}, {1, 33}, {}}}},
    {"channels last", {2, 3, 16, 17}, {{{816, 1, 51, 3}, {816, 1, 51, 3}, {816, 1, 51, 3}}}},
    {"channels last, but packed states", {2, 3, 16, 17}, {{{816, 1, 51, 3}, {816, 1, 51, 3}, {}}}},
    {"columns of a wider matrix", {50, 23}, {{{64, 1}, {}, {}}}},
    {"every third element", {1100}, {{{3}, {2}, {}}}},
    {"every second column, in long rows", {3, 1500}, {{{3100, 2}, {}, {1, 3}}}},
    {"gradient of one number", {1200}, {{{}, {0}, {}}}},
    {"gradient of one row", {40, 50}, {{{}, {0, 1}, {}}}},
    {"gradient of one column", {40, 50}, {{{}, {1, 0}, {}}}},
    {"sizes of 1", {1, 30, 1, 50, 1}, {{{7, 1, 7, 30, 0}, {9, 50, 9, 1, 9}, {}}}},
    {"all sizes 1", {1, 1, 1}, {{{5, 6, 7}, {0, 0, 0}, {}}}},
    {"empty", {5, 0, 3}, {{{1, 5, 5}, {}, {}}}},
    {"five dimensions", {3, 4, 5, 2, 6}, {{{1, 3, 12, 60, 120}, {}, {2, 6, 24, 120, 240}}}},
};

// One job, with memory of its own: a copy is another problem with the same values.
struct Problem {
  Setting setting;
  std::vector<std::int64_t> shape;
  bool wide = false;
  double grad_factor = 1.0;
  Followers followers;
  std::vector<Tensor> tensors;
  double clip_value = kNoLimit;
  bool zeroes_grad = false;
  Master master = Master::none;
};

inline bool uses(const Problem& problem, std::size_t operand) {
  if (operand == kMaster) return problem.master != Master::none;
  return operand >= kFirstFollower ? problem.followers[operand - kFirstFollower].has_value()
                                   : uses(problem.setting, operand);
}

inline std::int64_t length_of(const Problem& problem) {
  return std::accumulate(problem.shape.begin(), problem.shape.end(), std::int64_t{1}, std::multiplies<>());
}

std::vector<std::int64_t> packed(const std::vector<std::int64_t>& shape);

// Calls visit(index) for every index of this shape, the last dimension fastest.
template <class Visit>
void for_each_index(const std::vector<std::int64_t>& shape, Visit&& visit) {
  if (std::ranges::find(shape, 0) != shape.end()) return;
  std::vector<std::int64_t> index(shape.size(), 0);
  for (;;) {
    visit(index);
    std::size_t d = shape.size();
    while (d > 0 && ++index[d - 1] == shape[d - 1]) index[--d] = 0;
    if (d == 0) return;
  }
}

inline std::int64_t offset_of(const std::vector<std::int64_t>& index, const std::vector<std::int64_t>& strides) {
  return std::inner_product(index.begin(), index.end(), strides.begin(), std::int64_t{0});
}

// Whether an operand holds squares or sizes.
bool never_negative(const Setting& setting, std::size_t operand);

// Values from number(), or their sizes where an operand is never negative.
Problem make_problem(const Setting& setting, std::vector<std::int64_t> shape, const Spec& spec = {});

// A problem's job, and what the job points to.
class BoundJob {
 public:
  explicit BoundJob(Problem& problem) : constants_(problem.setting, problem.wide) {
    std::array<std::span<const std::int64_t>, kMaxOperands> strides;
    for (std::size_t k = 0; k < problem.tensors.size(); ++k) {
      if (!uses(problem, k)) continue;
      strides[k] = problem.tensors[k].strides;
      job_.operands[k] = {problem.tensors[k].at(0), problem.tensors[k].format};
    }
    layout_ = make_layout(problem.shape, strides);
    job_.layout = is_flat(layout_) ? nullptr : &layout_;
    job_.length = length_of(problem);
    job_.constants = constants_.data();
    job_.grad_factor = problem.grad_factor;
    for (std::size_t i = 0; i < kMaxFollowers; ++i) job_.followers[i] = problem.followers[i].value_or(Follower{});
    job_.wide = problem.wide;
    job_.clip_value = problem.clip_value;
    job_.zeroes_grad = problem.zeroes_grad;
    job_.master = problem.master;
    job_.takes_sums = info_of(problem.setting.rule).takes_sums(problem.setting.hyper.data());
    job_.scalars = problem.setting.scalars.data();
  }
  BoundJob(const BoundJob&) = delete;
  BoundJob& operator=(const BoundJob&) = delete;

  const Job& job() const { return job_; }

  // For tests of what the constants do: a step with sums completes them, and its constants are made on the GPU.
  Job without_sums() const {
    Job job = job_;
    job.takes_sums = false;
    return job;
  }

 private:
  Constants constants_;
  Layout layout_;
  Job job_;
};

// -- the reference ---------------------------------------------------------------------------------------------------

// Returns the problem after the step.
Problem expected(Problem problem);

// The same for a rule whose update depends on sums over its tensor, which are made in long double.
Problem expected_with_sums(Problem problem);

// Returns where two problems differ in a byte, guards, gaps and gradients included; empty if nowhere.
std::string difference(const Problem& got, const Problem& want);

}  // namespace onepass::testing
