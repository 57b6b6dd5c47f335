#include "reference.h"

#include <array>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <utility>

#include "cpu/fpmode.h"

namespace onepass::testing {

// -- problems --------------------------------------------------------------------------------------------------------

std::vector<Followers> all_followers() {
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

double number(std::uint64_t seed) {
  static constexpr double rare[] = {0.0, -0.0, 0x3p-24, -0x5p-130, 0x7p-1070};
  const std::uint64_t bits = scramble(seed + 0x9e3779b97f4a7c15U);
  if (bits % 32 < std::size(rare)) return rare[bits % 32];
  const double magnitude =
      std::ldexp(1.0 + static_cast<double>(bits >> 12) * 0x1p-52, -static_cast<int>(bits >> 5 & 7U) % 7);
  return (bits >> 8 & 1U) != 0U ? magnitude : -magnitude;
}

std::vector<std::int64_t> packed(const std::vector<std::int64_t>& shape) {
  std::vector<std::int64_t> strides(shape.size(), 1);
  for (std::size_t d = shape.size(); d-- > 1;) strides[d - 1] = strides[d] * shape[d];
  return strides;
}

bool never_negative(const Setting& setting, std::size_t operand) {
  if (operand < kFirstState || operand >= kFirstFollower) return false;
  const std::string_view name = info_of(setting.rule).state_names[operand - kFirstState];
  static constexpr std::string_view names[] = {"acc_delta",      "exp_avg_sq", "exp_avg_var", "exp_inf",
                                               "max_exp_avg_sq", "square_avg", "step_size",   "sum"};
  return std::ranges::find(names, name) != std::end(names);
}

namespace {

// Gives a problem low bits of every kind, or masters of which three in four are near the parameter.
void fill_master(Problem& problem) {
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

}  // namespace

Problem make_problem(const Setting& setting, std::vector<std::int64_t> shape, const Spec& spec) {
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
    const bool non_negative = never_negative(setting, k);
    with_format(tensor.format, [&]<class Codec>(Codec) {
      for (std::int64_t i = 0; i < elements; ++i) {
        const double value = number(static_cast<std::uint64_t>(i) * kMaxOperands + k);
        store<Codec>(tensor.at(i), non_negative ? std::fabs(value) : value);
      }
    });
  }
  if (spec.master != Master::none) fill_master(problem);
  return problem;
}

std::string difference(const Problem& got, const Problem& want) {
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

// -- the reference ---------------------------------------------------------------------------------------------------

namespace {

std::uint16_t bits_at(Tensor& tensor, std::int64_t offset) {
  std::uint16_t bits = 0;
  std::memcpy(&bits, tensor.at(offset), sizeof bits);
  return bits;
}

// Returns the master of an element, whose parameter has the value `param`.
float master_at(Problem& problem, const std::vector<std::int64_t>& index, float param) {
  Tensor& own = problem.tensors[kParam];
  Tensor& held = problem.tensors[kMaster];
  const std::int64_t at = offset_of(index, own.strides);
  const std::int64_t there = offset_of(index, held.strides);
  if (problem.master == Master::low_bits) {
    const auto low = static_cast<std::int16_t>(bits_at(held, there));
    if (param == 0.0F && low < 0) return param;  // the master of another number
    const std::int64_t joined = std::int64_t{bits_at(own, at)} * 0x10000 + low;
    return std::bit_cast<float>(static_cast<std::uint32_t>(joined));
  }
  const auto master = load<float>(held, there);
  Tensor rounded{.format = own.format, .memory = Memory(sizeof(float))};
  store(rounded, 0, master);
  const bool both_nan = std::isnan(master) && std::isnan(param);
  return both_nan || bits_at(rounded, 0) == bits_at(own, at) ? master : param;
}

// Returns the bits of a float's bfloat16 copy: to nearest, ties away from zero.
std::uint16_t rounded_away(float value) {
  const auto bits = std::bit_cast<std::uint32_t>(value);
  const std::uint32_t high = bits >> 16;
  if (std::isnan(value)) return static_cast<std::uint16_t>(high | 0x40U);
  return static_cast<std::uint16_t>((bits & 0xffffU) >= 0x8000U ? high + 1 : high);
}

// Writes the master of an element, and the parameter.
void store_master(Problem& problem, const std::vector<std::int64_t>& index, float master) {
  Tensor& own = problem.tensors[kParam];
  Tensor& held = problem.tensors[kMaster];
  const std::int64_t at = offset_of(index, own.strides);
  const std::int64_t there = offset_of(index, held.strides);
  if (problem.master == Master::whole) {
    store(own, at, master);
    store(held, there, master);
    return;
  }
  const std::uint16_t high = rounded_away(master);
  const auto low = std::isnan(master) ? std::uint16_t{0}
                                      : static_cast<std::uint16_t>(std::bit_cast<std::uint32_t>(master) & 0xffffU);
  std::memcpy(own.at(at), &high, sizeof high);
  std::memcpy(held.at(there), &low, sizeof low);
}

// Not inlined, so that no operation moves out of the step's floating-point mode.
template <class Rule, class T>
[[gnu::noinline]] void reference_step(Problem& problem, const typename Rule::template Constants<T>& constants) {
  constexpr auto states = std::make_index_sequence<Rule::state_names.size()>();
  const std::size_t operands = problem.tensors.size();
  for_each_index(problem.shape, [&](const auto& index) {
    T values[kMaxOperands] = {};  // a state that is absent reads as zero
    for (std::size_t k = 0; k < operands; ++k)
      if (uses(problem, k)) values[k] = load<T>(problem.tensors[k], offset_of(index, problem.tensors[k].strides));
    const bool has_master = problem.master != Master::none;
    if (has_master) values[kParam] = master_at(problem, index, static_cast<float>(values[kParam]));
    T gradient = static_cast<T>(problem.grad_factor) * values[kGrad];
    if (const T limit = static_cast<T>(problem.clip_value); std::fabs(gradient) > limit)
      gradient = std::copysign(limit, gradient);
    [&]<std::size_t... I>(std::index_sequence<I...>) {
      Rule::update(constants, values[kParam], gradient, values[kFirstState + I]...);
    }(states);
    for (std::size_t i = 0; i < kMaxFollowers; ++i) {
      if (!problem.followers[i]) continue;
      const auto [weight, sets_param] = *problem.followers[i];
      T& param = values[kParam];
      T& follower = values[kFirstFollower + i];
      if (!sets_param && !has_master) {
        Tensor& stored = problem.tensors[kParam];
        store(stored, offset_of(index, stored.strides), param);
        param = load<T>(stored, offset_of(index, stored.strides));
      }
      // From the nearer end, so that weights of 0 and 1 return an end to the bit.
      const T part = T(weight), rest = T(1.0 - weight), gap = param - follower;
      follower = weight == 1.0 ? param : part < T(0.5) ? follower + part * gap : param - rest * gap;
      if (sets_param) param = follower;
      if (problem.master == Master::low_bits && weight == 1.0 && !sets_param &&
          problem.tensors[kFirstFollower + i].format == Format::bfloat16)
        follower = std::bit_cast<float>(std::uint32_t{rounded_away(static_cast<float>(param))} << 16);
    }
    for (std::size_t k = 0; k < operands; ++k)
      if (uses(problem, k) && k != kMaster && (k != kGrad || problem.zeroes_grad) && (k != kParam || !has_master))
        store(problem.tensors[k], offset_of(index, problem.tensors[k].strides), k != kGrad ? values[k] : T(0));
    if (has_master) store_master(problem, index, static_cast<float>(values[kParam]));
  });
}

// The step with constants that the sums have completed.
template <class Rule, class T>
void step_with_sums(Problem& problem) {
  auto constants = Constants(problem.setting, problem.wide).as<typename Rule::template Constants<T>>();
  std::array<long double, kMaxSums> exact{};
  for_each_index(problem.shape, [&](const auto& index) {
    T values[kMaxOperands] = {};
    for (std::size_t k = 0; k < problem.tensors.size(); ++k)
      if (uses(problem, k)) values[k] = load<T>(problem.tensors[k], offset_of(index, problem.tensors[k].strides));
    if (problem.master != Master::none) values[kParam] = master_at(problem, index, static_cast<float>(values[kParam]));
    T gradient = static_cast<T>(problem.grad_factor) * values[kGrad];
    if (const T limit = static_cast<T>(problem.clip_value); std::fabs(gradient) > limit)
      gradient = std::copysign(limit, gradient);
    [&]<std::size_t... I>(std::index_sequence<I...>) {
      [&]<std::size_t... K>(std::index_sequence<K...>) {
        ((exact[K] += static_cast<double>(
              Rule::template summed<K>(constants, values[kParam], gradient, values[kFirstState + I]...))),
         ...);
      }(std::make_index_sequence<Rule::sums>());
    }(std::make_index_sequence<Rule::state_names.size()>());
  });
  std::array<double, kMaxSums> sums{};
  for (std::size_t k = 0; k < sums.size(); ++k) sums[k] = static_cast<double>(exact[k]);
  const RuleInfo& info = info_of(Rule::id);
  if (info.takes_sums(problem.setting.hyper.data()))
    info.use_sums(problem.wide, sums.data(), static_cast<double>(length_of(problem)), &constants,
                  problem.setting.scalars.data());
  reference_step<Rule, T>(problem, constants);
}

}  // namespace

Problem expected(Problem problem) {
  const Constants constants(problem.setting, problem.wide);
  with_rule(problem.setting.rule, [&]<class Rule>() {
    const StepMode mode;
    if (problem.wide) {
      reference_step<Rule, double>(problem, constants.as<typename Rule::template Constants<double>>());
    } else {
      reference_step<Rule, float>(problem, constants.as<typename Rule::template Constants<float>>());
    }
  });
  return problem;
}

Problem expected_with_sums(Problem problem) {
  with_rule(problem.setting.rule, [&]<class Rule>() {
    if constexpr (requires { Rule::sums; }) {
      const StepMode mode;
      if (problem.wide) {
        step_with_sums<Rule, double>(problem);
      } else {
        step_with_sums<Rule, float>(problem);
      }
    }
  });
  return problem;
}

}  // namespace onepass::testing
