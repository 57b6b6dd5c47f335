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
#if defined(__SANITIZE_ADDRESS__)
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
inline double number(std::uint64_t seed) {
  static constexpr double rare[] = {0.0, -0.0, 0x3p-24, -0x5p-130, 0x7p-1070};
  const std::uint64_t bits = scramble(seed + 0x9e3779b97f4a7c15U);
  if (bits % 32 < std::size(rare)) return rare[bits % 32];
  const double magnitude =
      std::ldexp(1.0 + static_cast<double>(bits >> 12) * 0x1p-52, -static_cast<int>(bits >> 5 & 7U) % 7);
  return (bits >> 8 & 1U) != 0U ? magnitude : -magnitude;
}

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
inline std::vector<Followers> all_followers() {
  std::vector<Followers> all;
  constexpr double weights[] = {0.0, 0.3, 0.5, 0.8, 1.0};
  for (const bool sets_param : {false, true})
    for (const double weight : weights) {
      all.push_back({Follower{weight, sets_param}});
      all.push_back({std::nullopt, Follower{weight, sets_param}});
      for (const bool second_sets : {false, true})
        for (const double second : weights)
          all.push_back({Follower{weight, sets_param}, Follower{second, second_sets}});
    }
  return all;
}

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

inline std::vector<std::int64_t> packed(const std::vector<std::int64_t>& shape) {
  std::vector<std::int64_t> strides(shape.size(), 1);
  for (std::size_t d = shape.size(); d-- > 1;) strides[d - 1] = strides[d] * shape[d];
  return strides;
}

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
inline bool never_negative(const Setting& setting, std::size_t operand) {
  if (operand < kFirstState || operand >= kFirstFollower) return false;
  const std::string_view name = info_of(setting.rule).state_names[operand - kFirstState];
  static constexpr std::string_view names[] = {"acc_delta",      "exp_avg_sq", "exp_avg_var", "exp_inf",
                                               "max_exp_avg_sq", "square_avg", "step_size",   "sum"};
  return std::ranges::find(names, name) != std::end(names);
}

// Gives a problem low bits of every kind, or masters of which three in four are near the parameter.
inline void fill_master(Problem& problem) {
  Tensor& master = problem.tensors[kMaster];
  Tensor& param = problem.tensors[kParam];
  std::uint64_t seed = 0;
  for_each_index(problem.shape, [&](const auto& index) {
    const std::uint64_t random = scramble(seed += 0x9e3779b97f4a7c15U);
    static constexpr std::uint16_t rare[] = {0, 1, 0x7fff, 0x8000, 0x8001, 0xffff};
    const auto low = random % 16 < std::size(rare) ? rare[random % 16] : static_cast<std::uint16_t>(random >> 8);
    std::byte* const to = master.at(offset_of(index, master.strides));
    if (problem.master == Master::low_bits) {
      std::memcpy(to, &low, sizeof low);
    } else if ((random >> 32) % 4 != 0) {
      const auto near = load<float>(param, offset_of(index, param.strides));
      const std::uint32_t bits = std::bit_cast<std::uint32_t>(near) + (low >> 4);
      std::memcpy(to, &bits, sizeof bits);
    }
  });
}

inline Problem make_problem(const Setting& setting, std::vector<std::int64_t> shape, const Spec& spec = {}) {
  Problem problem{setting, std::move(shape), spec.wide,        spec.grad_factor, spec.followers,
                  {},      spec.clip_value,  spec.zeroes_grad, spec.master};
  const bool followed = std::ranges::any_of(spec.followers, [](const auto& each) { return each.has_value(); });
  const std::size_t operands = followed || spec.master != Master::none ? kMaxOperands : operands_of(setting);
  for (std::size_t k = 0; k < operands; ++k) {
    Tensor& tensor = problem.tensors.emplace_back();
    if (!uses(problem, k)) continue;
    tensor.format = spec.formats[k];
    if (k == kMaster) tensor.format = spec.master == Master::whole ? Format::float32 : Format::bfloat16;
    const bool as_param = k > kFirstFollower && k != kMaster;
    const auto& strides = spec.strides[as_param ? kParam : std::min<std::size_t>(k, kFirstState)];
    tensor.strides = strides.empty() ? packed(problem.shape) : strides;
    std::int64_t elements = 0;
    for_each_index(problem.shape,
                   [&](const auto& index) { elements = std::max(elements, offset_of(index, tensor.strides) + 1); });
    tensor.first = kGuardBefore + (spec.misalignment + k * spec.stagger) % 64 + spec.ahead[k] * size_of(tensor.format);
    const std::size_t size = tensor.first + static_cast<std::size_t>(elements) * size_of(tensor.format) + kGuardAfter;
    tensor.memory = Memory(size);
    for (std::int64_t i = 0; i < elements; ++i) {
      const double value = number(static_cast<std::uint64_t>(i) * kMaxOperands + k);
      store(tensor, i, never_negative(setting, k) ? std::fabs(value) : value);
    }
  }
  if (spec.master != Master::none) fill_master(problem);
  return problem;
}

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
inline std::string difference(const Problem& got, const Problem& want) {
  for (std::size_t k = 0; k < want.tensors.size(); ++k) {
    const auto& a = got.tensors[k].memory;
    const auto& b = want.tensors[k].memory;
    if (b.size() == 0 || std::memcmp(a.data(), b.data(), b.size()) == 0) continue;
    const auto byte = std::mismatch(a.data(), a.data() + a.size(), b.data()).first - a.data() -
                      static_cast<std::ptrdiff_t>(want.tensors[k].first);
    return std::string(want.setting.what) + ", operand " + std::to_string(k) + " of " +
           name_of(want.tensors[k].format) + (want.wide ? " in float64" : " in float32") + ", first at byte " +
           std::to_string(byte) + " of " + std::to_string(length_of(want)) + " elements";
  }
  return "";
}

}  // namespace onepass::testing
