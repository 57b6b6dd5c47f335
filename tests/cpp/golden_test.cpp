// The golden table: hashes of what steps compute, which must be the same for every instruction set and on every
// processor (golden.txt). With the environment variable ONEPASS_WRITE_GOLDEN=FILE the table is written instead.
//
// The values are neither denormal nor near the largest: about those, processors differ (README, limits).
#include <doctest/doctest.h>

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <fstream>
#include <map>
#include <sstream>
#include <string>
#include <vector>

#include "cases.h"
#include "cpu/factored.h"
#include "cpu/flat.h"
#include "cpu/step.h"
#include "cpu/two_loop.h"
#include "formats/stochastic.h"
#include "reference.h"

namespace onepass::testing {
namespace {

using Table = std::map<std::string, std::uint64_t>;

// Values between 2^-6 and 2, of both signs.
double plain(std::uint64_t seed) {
  const std::uint64_t bits = scramble(seed + 0x9e3779b97f4a7c15U);
  const double magnitude = std::ldexp(1.0 + static_cast<double>(bits >> 12) * 0x1p-52, -static_cast<int>(bits % 7));
  return (bits >> 8 & 1U) != 0U ? magnitude : -magnitude;
}

// FNV-1a. All NaNs are alike.
class Hash {
 public:
  void add(double value) {
    auto bits = std::isnan(value) ? ~std::uint64_t{0} : std::bit_cast<std::uint64_t>(value);
    for (int byte = 0; byte < 8; ++byte, bits >>= 8) {
      hash_ ^= bits & 0xffU;
      hash_ *= 0x100000001b3U;
    }
  }
  void add(Tensor& tensor, std::int64_t elements) {
    for (std::int64_t i = 0; i < elements; ++i) add(load<double>(tensor, i));
  }
  std::uint64_t value() const { return hash_; }

 private:
  std::uint64_t hash_ = 0xcbf29ce484222325U;
};

// A packed tensor. Averages of squares and sizes begin above zero.
Tensor filled(Format format, std::int64_t elements, std::uint64_t seed, bool positive) {
  Tensor tensor{.format = format, .strides = {1}, .memory = Memory(static_cast<std::size_t>(elements) * 8)};
  for (std::int64_t i = 0; i < elements; ++i) {
    const double value = plain(seed + static_cast<std::uint64_t>(i));
    store(tensor, i, positive ? std::fabs(value) : value);
  }
  return tensor;
}

Operand operand(Tensor& tensor) { return {tensor.at(0), tensor.format}; }

constexpr std::int64_t kRows = 4;
constexpr int kSteps = 20;

// How the operands of a step are stored.
struct Storage {
  const char* what;
  Format own, states;
  bool wide = false, blocks = false, stochastic = false;
  std::int64_t first = 0;  // index of the first element in the whole tensor
  std::int64_t row = 75;   // elements: two whole blocks and a shorter one
};
constexpr Storage kStorages[] = {
    {"float32", Format::float32, Format::float32},
    {"float64", Format::float64, Format::float64, true},
    {"bfloat16", Format::bfloat16, Format::bfloat16},
    {"float16", Format::float16, Format::float32},
    {"bfloat16, random bits", Format::bfloat16, Format::bfloat16, false, false, true},
    {"8 bits", Format::float32, Format::float8_e4m3fn, false, true},
    {"bfloat16, 8 bits, random bits", Format::bfloat16, Format::float8_e4m3fn, false, true, true},
    {"the same, past 2^32", Format::bfloat16, Format::float8_e4m3fn, false, true, true, (std::int64_t{1} << 32) - 100},
    {"8 bits, long rows", Format::float32, Format::float8_e4m3fn, false, true, false, 0, 1000},
};

// Twenty steps of one tensor, and the rule's scalars after them.
std::uint64_t steps_of(Setting setting, const Storage& storage) {
  const RuleInfo& info = info_of(setting.rule);
  const std::size_t operands = operands_of(setting);
  const std::int64_t row = storage.row, elements = kRows * row;
  Job job;
  job.length = elements;
  job.wide = storage.wide;
  std::vector<Tensor> tensors(operands);
  std::vector<std::vector<std::byte>> scales(operands);
  for (std::size_t k = 0; k < operands; ++k) {
    if (!uses(setting, k)) continue;
    const bool is_state = k >= kFirstState;
    if (is_state && storage.blocks) {
      const std::size_t s = k - kFirstState;
      tensors[k] = {
          .format = Format::float8_e4m3fn, .strides = {1}, .memory = Memory(static_cast<std::size_t>(elements))};
      std::memset(tensors[k].memory.data(), 0, static_cast<std::size_t>(elements));
      scales[k].assign(static_cast<std::size_t>(kRows * ((row + kBlockLength - 1) / kBlockLength)), std::byte{1});
      job.blocks.scales[s] = scales[k].data();
      job.blocks.codings[s] = info.state_codings[s];
      job.blocks.row_length = row;
    } else {
      tensors[k] = filled(is_state ? storage.states : storage.own, elements, k << 32, never_negative(setting, k));
    }
    job.operands[k] = operand(tensors[k]);
  }
  job.takes_sums = info.takes_sums(setting.hyper.data());
  job.scalars = setting.scalars.data();
  job.rounding = {.stochastic = storage.stochastic, .first = storage.first, .key = 0, .seed = 5, .step = 0, .param = 3};
  for (int t = 0; t < kSteps; ++t) {
    for (std::int64_t i = 0; i < elements; ++i)
      store(tensors[kGrad], i, plain((static_cast<std::uint64_t>(t) << 40) + static_cast<std::uint64_t>(i)));
    job.rounding.step = static_cast<std::uint64_t>(t) + 1;
    job.rounding.key = random_key(job.rounding.seed, job.rounding.step, job.rounding.param);
    const Constants constants(setting, storage.wide);
    job.constants = constants.data();
    run_step(setting.rule, {&job, 1}, 1);
    if (!job.takes_sums) info.advance(setting.hyper.data(), setting.step, setting.scalars.data());
    setting.step += 1.0;
  }
  Hash hash;
  for (std::size_t k = 0; k < operands; ++k) {
    if (!uses(setting, k)) continue;
    if (tensors[k].format == Format::float8_e4m3fn) {
      for (std::int64_t i = 0; i < elements; ++i) hash.add(static_cast<double>(*tensors[k].at(i)));
      for (const std::byte scale : scales[k]) hash.add(static_cast<double>(scale));
    } else {
      hash.add(tensors[k], elements);
    }
  }
  for (const double scalar : setting.scalars) hash.add(scalar);
  return hash.value();
}

// One element after steps of many numbers, which shows the constants.
std::uint64_t constants_of(Setting setting, bool wide) {
  Hash hash;
  for (int step = 1; step < 20'000; step += 1 + step / 50) {
    setting.step = step;
    Problem problem = make_problem(setting, {1}, {.formats = all_of(native(wide)), .wide = wide});
    for (std::size_t k = 0; k < problem.tensors.size(); ++k)
      if (uses(setting, k)) store(problem.tensors[k], 0, std::fabs(plain(k)));
    const BoundJob bound(problem);
    run_step(setting.rule, {&bound.job(), 1}, 1);
    for (std::size_t k = 0; k < problem.tensors.size(); ++k)
      if (uses(setting, k)) hash.add(problem.tensors[k], 1);
  }
  return hash.value();
}

// Steps of Adafactor or CAME.
std::uint64_t factored(bool came, bool wide, std::int64_t slices, std::int64_t rows, std::int64_t columns) {
  const bool vector = rows * columns == 1;
  const std::int64_t length = slices * rows * columns;
  const AdafactorHyper adafactor{
      .lr = 0.01, .beta2_decay = -0.8, .eps1 = 1e-7, .eps2 = 1e-3, .d = 1, .weight_decay = 0.1};
  const CameHyper hyper{.lr = 0.01,
                        .beta1 = 0.9,
                        .beta2 = 0.999,
                        .beta3 = 0.9999,
                        .eps1 = 1e-30,
                        .eps2 = 1e-16,
                        .clip_threshold = 1,
                        .weight_decay = 0.1};
  FactoredJob job;
  job.slices = slices;
  job.rows = rows;
  job.columns = columns;
  job.is_came = came;
  job.came = Came::prepare(hyper, 1);
  job.wide = wide;
  std::vector<Tensor> tensors(kFactoredOperands);
  std::vector<std::int64_t> lengths(kFactoredOperands);
  std::array<std::span<const std::int64_t>, kMaxOperands> strides;
  std::array<std::int64_t, kFactoredOperands> of_slice{};
  for (std::size_t k = 0; k < kFactoredOperands; ++k) {
    const bool of_rows = k == kRowVar || k == kResidualRowVar;
    const bool of_columns = k == kColumnVar || k == kResidualColumnVar;
    if ((vector && (of_columns || k == kResidualRowVar)) || (!came && k >= kMomentum)) continue;
    of_slice[k] = (of_columns ? 1 : rows) * (of_rows ? 1 : columns);
    lengths[k] = slices * of_slice[k];
    tensors[k] = filled(native(wide), lengths[k], k << 32, of_rows || of_columns);
    job.operands[k] = operand(tensors[k]);
    job.row_strides[k] = of_columns ? 0 : of_rows ? 1 : columns;
    job.column_strides[k] = of_rows ? 0 : 1;
    strides[k] = {&of_slice[k], 1};
  }
  const std::array shape{slices};
  const Layout layout = make_layout(shape, strides);
  job.batch = slices < 2 || is_flat(layout) ? nullptr : &layout;
  FactoredRoom room;
  for (int t = 0; t < kSteps; ++t) {
    for (std::int64_t i = 0; i < length; ++i)
      store(tensors[kGrad], i, plain((static_cast<std::uint64_t>(t) << 40) + static_cast<std::uint64_t>(i)));
    job.adafactor = Adafactor::prepare(adafactor, t + 1);
    run_factored({&job, 1}, 1, room);
  }
  Hash hash;
  for (std::size_t k = 0; k < kFactoredOperands; ++k) hash.add(tensors[k], lengths[k]);
  return hash.value();
}

// A direction of L-BFGS, with a history of five pairs.
std::uint64_t direction(bool wide) {
  constexpr std::int64_t length = 5000;
  const Flat flat{{1000, length}, wide, 1};
  const Format format = native(wide);
  const std::vector<double> weights{1.0, 0.5};
  Tensor gradient = filled(format, length, 1, false);
  History history;
  std::vector<Tensor> s, y;
  std::vector<Pair> pairs;
  Found found;
  for (std::uint64_t k = 0; k < 5; ++k) {
    s.push_back(filled(format, length, (k + 2) << 32, false));
    Tensor& change = y.emplace_back(filled(format, length, (k + 2) << 32, false));  // s, times positive numbers
    for (std::int64_t i = 0; i < length; ++i)
      store(change, i, load<double>(change, i) * std::fabs(plain(static_cast<std::uint64_t>(i))));
  }
  for (std::size_t k = 0; k < s.size(); ++k) {
    pairs.push_back({operand(s[k]), operand(y[k])});
    found = run(flat, Products{.pairs = pairs, .gradient = operand(gradient), .previous = {}, .direction = {}});
    history.push(found);
  }
  const History::Direction combined = history.direction(found, 0, weights);
  Tensor out = filled(format, length, 0, false);
  const Found slopes = run(
      flat, Combine{.pairs = pairs, .factors = combined.factors, .gradient = operand(gradient), .out = operand(out)});
  Hash hash;
  hash.add(out, length);
  for (const double alpha : combined.alpha) hash.add(alpha);
  for (const double sum : slopes.sums) hash.add(sum);
  return hash.value();
}

Table computed() {
  Table table;
  for (const Setting& setting : kSettings) {
    const std::string what(setting.what);
    for (const Storage& storage : kStorages)
      if (!storage.blocks || !info_of(setting.rule).state_codings.empty())
        table[what + "; " + storage.what] = steps_of(setting, storage);
    for (const bool wide : {false, true})
      table[what + "; constants in " + name_of(native(wide))] = constants_of(setting, wide);
  }
  for (const bool wide : {false, true}) {
    const std::string where = name_of(native(wide));
    for (const bool came : {false, true}) {
      const std::string what = (came ? "came in " : "adafactor in ") + where;
      table[what + "; matrix"] = factored(came, wide, 1, 70, 90);
      table[what + "; small matrices"] = factored(came, wide, 50, 3, 3);
      table[what + "; vector"] = factored(came, wide, 300, 1, 1);
    }
    table["lbfgs; direction, " + where] = direction(wide);
  }
  return table;
}

// A line of the table is a hash and a name.
Table read() {
  std::ifstream file(ONEPASS_GOLDEN_TABLE);
  Table table;
  for (std::string line; std::getline(file, line);) {
    if (line.starts_with('#')) continue;
    std::istringstream words(line);
    std::uint64_t hash = 0;
    std::string name;
    words >> std::hex >> hash;
    std::getline(words >> std::ws, name);
    table[name] = hash;
  }
  return table;
}

void write(const Table& table, const char* path) {
  std::ofstream file(path);
  file << "# Written by golden_test with ONEPASS_WRITE_GOLDEN: hashes of what steps compute, on every processor.\n";
  for (const auto& [name, hash] : table) {
    file.width(16);
    file.fill('0');
    file << std::hex << hash << ' ' << name << '\n';
  }
  REQUIRE(file.good());
}

TEST_CASE("the golden table") {
  if (const char* path = std::getenv("ONEPASS_WRITE_GOLDEN"); path != nullptr) {
    write(computed(), path);
    return;
  }
  const Table want = read();
  REQUIRE(want.size() > 500);
  for (const Isa& isa : supported_isas()) {
    CAPTURE(std::string(isa.name));
    force_isa(isa.name);
    const Table got = computed();
    CHECK(got.size() == want.size());
    for (const auto& [name, hash] : got) {
      CAPTURE(name);
      const auto known = want.find(name);
      REQUIRE(known != want.end());
      CHECK(known->second == hash);
    }
  }
  force_isa("");
}

}  // namespace
}  // namespace onepass::testing
