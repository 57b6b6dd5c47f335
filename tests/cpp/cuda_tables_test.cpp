// The host side of a step on a GPU: the contents of its tables, and the order of launches. No kernel runs here: the
// backend records the launches, and the addresses of jobs are not read.
#include <doctest/doctest.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <deque>
#include <limits>
#include <map>
#include <stdexcept>
#include <tuple>
#include <utility>
#include <vector>

#include "cuda/step.h"
#include "reference.h"

namespace onepass::testing {
namespace {

using namespace cuda;
using Words = std::vector<std::uint64_t>;

constexpr std::uint32_t kChunk = 4096;
constexpr std::size_t kRowWords = sizeof(Row) / sizeof(std::uint64_t);
constexpr std::size_t kCounterWords = sizeof(Counter) / sizeof(std::uint64_t);

// -- the recorder ----------------------------------------------------------------------------------------------------

struct Launch {
  Work work;
  RuleId rule;
  bool wide;
  void* stream;
  Header header;
  Words words;  // those in use
};

std::vector<Launch> recorded;

const char* record(Work work, RuleId rule, bool wide, const LargeTable& table, void* stream) {
  REQUIRE(table.header.words <= LargeTable::kWords);
  recorded.push_back({.work = work,
                      .rule = rule,
                      .wide = wide,
                      .stream = stream,
                      .header = table.header,
                      .words = Words(table.words, table.words + table.header.words)});
  return nullptr;
}

// Enough multiprocessors for the shortest chunks.
constexpr Backend kRecorder{
    .fingerprint = fingerprint(),
    .built = "a recorder",
    .unusable = []() -> const char* { return nullptr; },
    .multiprocessors = [](int) { return 1 << 30; },
    .launch = &record,
    .decide = nullptr,
};

template <class RowType>
RowType row_of(const Launch& launch, std::size_t number) {
  constexpr std::size_t size = sizeof(RowType) / sizeof(std::uint64_t);
  REQUIRE((number + 1) * size <= launch.words.size());
  RowType row;
  std::memcpy(&row, launch.words.data() + number * size, sizeof row);
  return row;
}

// -- models ----------------------------------------------------------------------------------------------------------

std::byte* pointer(std::uint64_t address) { return reinterpret_cast<std::byte*>(address); }
std::uint64_t address(const void* pointer) { return reinterpret_cast<std::uintptr_t>(pointer); }

std::byte* const kWorkspace = pointer(0x7000'0000'0000);
void* const kStream = pointer(0x5000);
constexpr int kDevice = 3;

// The jobs of a step, group by group, and the objects that they point to.
class Model {
 public:
  explicit Model(RuleId rule, std::size_t states) : rule_(rule), states_(states) { add_group(); }

  // A group with numbers of its own. If it counts on the GPU, its hyperparameters are values and addresses in turn.
  void add_group(bool counts = false) {
    Group& group = groups_.emplace_back();
    counts_ = counts;
    for (std::byte& byte : group.constants) byte = static_cast<std::byte>(scramble(next_ += 1));
    for (std::size_t h = 0; h < group.hyper.size(); ++h) {
      group.hyper[h] = {.value = number(next_ += 1)};
      if (h % 2 != 0) group.hyper[h] = {.data = place(), .format = h % 4 == 1 ? Format::float32 : Format::float64};
    }
  }

  // Adds a job to the last group: aligned, all operands in one format.
  DeviceJob& add(std::int64_t length, bool wide = false) {
    DeviceJob& added = jobs_.emplace_back();
    added.job.length = length;
    added.job.wide = wide;
    for (std::size_t k = 0; k < kFirstState + states_; ++k) added.job.operands[k] = {place(), native(wide)};
    if (counts_) {
      added.hyper = &groups_.back().hyper;
      added.numbers = {Number{.data = place(), .format = Format::float32}, Number{.value = number(next_ += 1)},
                       Number{.data = place(), .format = Format::float64}};
    } else {
      added.job.constants = groups_.back().constants.data();
    }
    return added;
  }

  const Layout* add_layout(std::size_t dimensions) {
    Layout& layout = layouts_.emplace_back();
    layout.shape.assign(dimensions, 2);
    for (std::size_t k = 0; k < kMaxOperands; ++k)
      for (std::size_t d = 0; d < dimensions; ++d)
        layout.strides[k].push_back(static_cast<std::int64_t>(scramble(next_ += 1) % 1000));
    return &layout;
  }

  // Returns an unused address, at the beginning of a vector.
  std::byte* place() { return pointer(next_ += 0x1000 - next_ % 0x1000); }

  std::vector<DeviceJob>& jobs() { return jobs_; }
  const std::vector<DeviceJob>& jobs() const { return jobs_; }
  RuleId rule() const { return rule_; }

 private:
  struct Group {
    std::array<std::byte, kMaxConstantBytes> constants;
    std::array<Number, kMaxHyper> hyper;
  };
  RuleId rule_;
  std::size_t states_;
  bool counts_ = false;
  std::uint64_t next_ = 0x6000'0000'0000;
  std::deque<Group> groups_;
  std::deque<Layout> layouts_;
  std::vector<DeviceJob> jobs_;
};

Model adam() { return Model(RuleId::adam, 2); }

// -- contents of tables ----------------------------------------------------------------------------------------------

std::size_t constants_size(const Launch& launch) { return info_of(launch.rule).constants_size[launch.wide ? 1 : 0]; }

void check_number(std::uint64_t word, std::uint64_t formats, std::size_t n, const Number& number) {
  const std::uint64_t format = formats >> (4 * n) & 0xfU;
  if (number.data == nullptr) {
    CHECK(format == kValue);
    CHECK(std::bit_cast<double>(word) == number.value);
  } else {
    CHECK(format == static_cast<std::uint64_t>(number.format));
    CHECK(word == address(number.data));
  }
}

// Returns the address where this counter writes the constants.
std::uint64_t check_counter(const Launch& launch, std::size_t number, const DeviceJob& job) {
  const auto counter = row_of<Counter>(launch, number);
  const std::size_t hypers = info_of(launch.rule).hyper_names.size();
  for (std::size_t n = 0; n < job.numbers.size(); ++n)
    check_number(counter.numbers[n], counter.formats, n, job.numbers[n]);
  REQUIRE(counter.hyper + hypers < launch.words.size());
  for (std::size_t h = 0; h < hypers; ++h)
    check_number(launch.words[counter.hyper + h], launch.words[counter.hyper + hypers], h, (*job.hyper)[h]);
  return launch.header.workspace + counter.constants * sizeof(std::uint64_t);
}

// The combinations of formats that the kernels have: of parameter and gradient, and of all states.
struct Known {
  Format own, states;
  bool wide;
  Access access;
};
constexpr Known kKnown[] = {
    {Format::float64, Format::float64, true, Access::plain},
    {Format::float32, Format::float32, false, Access::plain},
    {Format::bfloat16, Format::bfloat16, false, Access::bfloat16},
    {Format::float16, Format::float16, false, Access::float16},
    {Format::float32, Format::bfloat16, false, Access::bfloat16_states},
    {Format::bfloat16, Format::float32, false, Access::float32_states},
};

bool is_of(const Known& known, const Job& job) {
  for (std::size_t k = 0; k < kMaxOperands; ++k)
    if (job.operands[k].data != nullptr && job.operands[k].format != (k < kFirstState ? known.own : known.states))
      return false;
  return known.wide == job.wide && job.operands[kFirstFollower].data == nullptr &&
         job.operands[kFirstFollower + 1].data == nullptr && job.operands[kMaster].data == nullptr;
}

// Vectors if the formats are narrow enough and there are not both a master and followers, beginning where the most
// bytes are aligned.
void check_access(const Row& row, const Job& job) {
  const std::size_t size = job.wide ? 8 : 4;
  const std::size_t width = 16 / size;
  bool vectors = job.layout == nullptr;
  for (const Operand& operand : job.operands)
    if (operand.data != nullptr) vectors = vectors && onepass::size_of(operand.format) <= size;
  if (job.master != Master::none)
    for (std::size_t k = kFirstFollower; k < kMaster; ++k) vectors = vectors && job.operands[k].data == nullptr;
  if (!vectors) {
    CHECK(row.access == Access::elements);
    CHECK(row.phase == 0);
    return;
  }
  std::vector<unsigned> aligned(width, 0);
  std::vector<std::size_t> bytes(width, 0);
  for (std::size_t phase = 0; phase < width; ++phase)
    for (std::size_t k = 0; k < kMaxOperands; ++k) {
      const Operand& operand = job.operands[k];
      const std::size_t element = onepass::size_of(operand.format);
      if (operand.data == nullptr || (address(operand.data) + phase * element) % (width * element) != 0) continue;
      aligned[phase] |= 1U << k;
      bytes[phase] += element;
    }
  CHECK(row.phase == std::ranges::max_element(bytes) - bytes.begin());
  CHECK(row.aligned == aligned[row.phase]);
  const auto* const known = std::ranges::find_if(kKnown, [&](const Known& formats) { return is_of(formats, job); });
  CHECK(row.access == (known != std::end(kKnown) && row.aligned == row.held ? known->access : Access::mixed));
}

void check_row(const Launch& launch, std::size_t number, const DeviceJob& device_job, std::uint64_t slot) {
  const Job& job = device_job.job;
  const Header& header = launch.header;
  const Words& words = launch.words;
  const auto row = row_of<Row>(launch, number);
  CHECK(row.length == job.length);
  check_access(row, job);

  // Its blocks follow those of the last row and reach its end, and the last block has elements.
  if (number == 0) CHECK(row.first_block == 0);
  const std::uint32_t next = number + 1 < header.rows ? row_of<Row>(launch, number + 1).first_block : header.blocks;
  const std::int64_t blocks = std::int64_t{next} - row.first_block;
  CHECK(blocks >= 1);
  CHECK(row.phase + blocks * header.chunk >= job.length);
  if (blocks > 1) CHECK(row.phase + (blocks - 1) * header.chunk < job.length);

  std::size_t pointer = row.pointers;
  for (std::size_t k = 0; k < kMaxOperands; ++k) {
    const Operand& operand = job.operands[k];
    CHECK((row.held >> k & 1U) == (operand.data != nullptr ? 1U : 0U));
    if (operand.data == nullptr) continue;
    CHECK(words.at(pointer++) == address(operand.data));
    if (k != kMaster) CHECK((row.formats >> (4 * k) & 0xfU) == static_cast<unsigned>(operand.format));
  }
  CHECK(row.master == job.master);

  CHECK((row.maximize != 0 ? -header.grad_factor : header.grad_factor) == job.grad_factor);
  CHECK(header.clip_value == job.clip_value);
  CHECK((row.zeroes_grad != 0) == job.zeroes_grad);
  for (std::size_t i = 0; i < kMaxFollowers; ++i)
    if (job.operands[kFirstFollower + i].data != nullptr) CHECK((header.followers[i] == job.followers[i]));

  if (device_job.hyper != nullptr) {
    CHECK(header.workspace + row.constants * sizeof(std::uint64_t) == slot);
  } else {
    CHECK(header.workspace == 0);
    REQUIRE(row.constants * sizeof(std::uint64_t) + constants_size(launch) <= words.size() * sizeof(std::uint64_t));
    CHECK(std::memcmp(words.data() + row.constants, job.constants, constants_size(launch)) == 0);
  }

  CHECK((row.has_layout != 0) == (job.layout != nullptr));
  if (job.layout != nullptr) {
    std::size_t at = row.layout;
    CHECK(words.at(at++) == job.layout->shape.size());
    for (const std::int64_t size : job.layout->shape) CHECK(words.at(at++) == static_cast<std::uint64_t>(size));
    for (std::size_t k = 0; k < kMaxOperands; ++k)
      if (job.operands[k].data != nullptr)
        for (const std::int64_t stride : job.layout->strides[k])
          CHECK(words.at(at++) == static_cast<std::uint64_t>(stride));
  }
}

// Whether a row may be in the same table as the first one.
bool are_alike(const DeviceJob& first, const DeviceJob& other) {
  for (std::size_t i = 0; i < kMaxFollowers; ++i)
    if (other.job.operands[kFirstFollower + i].data != nullptr && first.job.followers[i] != other.job.followers[i])
      return false;
  return std::fabs(first.job.grad_factor) == std::fabs(other.job.grad_factor) &&
         first.job.clip_value == other.job.clip_value && (first.hyper != nullptr) == (other.hyper != nullptr);
}

// The most words that a row can need.
std::size_t words_for(const Launch& launch, const Job& job) {
  const auto operands =
      std::ranges::count_if(job.operands, [](const Operand& operand) { return operand.data != nullptr; });
  const auto held = static_cast<std::size_t>(operands);
  const std::size_t layout = job.layout != nullptr ? 1 + job.layout->shape.size() * (1 + held) : 0;
  return kRowWords + held + layout + (constants_size(launch) + 7) / 8;
}

// Runs a step of a model, and compares the launches with its jobs, one after the other.
std::vector<Launch> step(const Model& model, const Inputs& inputs = {}) {
  recorded.clear();
  run_step(kRecorder, model.rule(), model.jobs(), inputs, kWorkspace, kDevice, kStream);
  const std::vector<Launch> launches = std::exchange(recorded, {});

  // All counters before all rows, and float32 before float64.
  CHECK(std::ranges::is_sorted(launches, {}, [](const Launch& launch) { return std::pair(launch.work, launch.wide); }));
  std::map<std::pair<Work, bool>, std::vector<const DeviceJob*>> expected;
  for (const DeviceJob& job : model.jobs()) {
    if (job.hyper != nullptr) expected[{Work::prepare, job.job.wide}].push_back(&job);
    if (job.job.length > 0) expected[{Work::step, job.job.wide}].push_back(&job);
  }

  std::map<const DeviceJob*, std::uint64_t> slots;  // the address of each job's constants
  std::map<std::pair<Work, bool>, std::size_t> done;
  for (const Launch& launch : launches) {
    CHECK(launch.rule == model.rule());
    CHECK(launch.stream == kStream);
    CHECK(launch.header.chunk == kChunk);
    CHECK(launch.header.grad_scale == address(inputs.grad_scale));
    CHECK(launch.header.found_inf == address(inputs.found_inf));
    CHECK(launch.header.clipping == address(inputs.clipping));
    CHECK(launch.header.rows > 0);
    const std::pair key(launch.work, launch.wide);
    const std::vector<const DeviceJob*>& jobs = expected[key];
    std::size_t& next = done[key];
    REQUIRE(next + launch.header.rows <= jobs.size());
    const DeviceJob& first = *jobs[next];
    for (std::size_t number = 0; number < launch.header.rows; ++number) {
      const DeviceJob* job = jobs[next++];
      if (launch.work == Work::prepare) {
        slots[job] = check_counter(launch, number, *job);
      } else {
        check_row(launch, number, *job, job->hyper != nullptr ? slots.at(job) : 0);
      }
    }
    // A new launch begins only if it is necessary.
    if (launch.work == Work::step && next < jobs.size() && are_alike(first, *jobs[next])) {
      const DeviceJob& following = *jobs[next];
      const std::uint64_t blocks = launch.header.blocks + std::uint64_t(following.job.length) / kChunk;
      const bool is_full = launch.words.size() + words_for(launch, following.job) > LargeTable::kWords;
      const bool is_far =
          following.hyper != nullptr && slots.at(&following) - launch.header.workspace > 0xffff * sizeof(std::uint64_t);
      CHECK((is_full || is_far || blocks > 0x7fff'0000));
    }
  }
  for (const auto& [key, jobs] : expected) CHECK(done[key] == jobs.size());

  // The constants of two jobs do not overlap, and all are in the workspace.
  std::vector<std::pair<std::uint64_t, std::size_t>> places;
  for (const auto& [job, slot] : slots)
    places.emplace_back(slot, info_of(model.rule()).constants_size[job->job.wide ? 1 : 0]);
  std::ranges::sort(places);
  std::uint64_t end = address(kWorkspace);
  for (const auto& [slot, size] : places) {
    CHECK(slot % 8 == 0);
    CHECK(slot >= end);
    end = slot + size;
  }
  CHECK(end <= address(kWorkspace) + workspace_size(model.rule(), model.jobs()));
  return launches;
}

// -- launches --------------------------------------------------------------------------------------------------------

TEST_CASE("chunks are long if every multiprocessor has enough of them") {
  struct {
    std::int64_t elements;
    int multiprocessors;
    std::uint32_t want;
  } const table[] = {
      {0, 132, 4096},
      {1, 1, 4096},
      {32 * 132 * 8192 - 1, 132, 4096},
      {32 * 132 * 8192, 132, 8192},
      {32 * 132 * 16384 - 1, 132, 8192},
      {32 * 132 * 16384, 132, 16384},
      {std::int64_t{1} << 50, 132, 16384},
      {32 * 16384, 1, 16384},
  };
  for (const auto& row : table) CHECK(chunk_length(row.elements, row.multiprocessors) == row.want);
}

TEST_CASE("without work there is no launch") {
  Model model = adam();
  CHECK(step(model).empty());
  model.add(0);
  model.add(0, true);
  CHECK(step(model).empty());
  CHECK(workspace_size(model.rule(), model.jobs()) == 0);
}

TEST_CASE("an empty tensor has no row, but counts its step") {
  Model model = adam();
  model.add_group(true);
  model.add(0);
  model.add(5);
  model.add(0);
  const std::vector<Launch> launches = step(model);
  REQUIRE(launches.size() == 2);
  CHECK(launches[0].header.rows == 3);
  CHECK(launches[1].header.rows == 1);
}

TEST_CASE("blocks at the ends of chunks") {
  Model model = adam();
  for (const std::size_t ahead : {0U, 1U, 2U, 3U})
    for (const std::int64_t length : {1, 2, 3, 4, 5, 4095, 4096, 4097, 4098, 4099, 4100, 8191, 8192, 8193, 8196}) {
      for (Operand& operand : model.add(length).job.operands)
        if (operand.data != nullptr) operand.data += ahead * sizeof(float);
    }
  CHECK(step(model).size() == 1);
}

TEST_CASE("groups, formats and signs share a launch; each arithmetic type has a table") {
  Model model = adam();
  for (int group = 0; group < 200; ++group) {
    model.add_group();
    Job& job = model.add(1000 + group).job;
    job.operands[kGrad].format = group % 2 == 0 ? Format::bfloat16 : Format::float32;
    job.operands[kFirstState].format = group % 3 == 0 ? Format::float16 : Format::float32;
    job.grad_factor = group % 5 == 0 ? -0.5 : 0.5;
    if (group % 7 == 0) job.layout = model.add_layout(2);
    if (group % 50 == 0) model.add(100, true).job.grad_factor = 0.5;
  }
  const std::vector<Launch> launches = step(model);
  REQUIRE(launches.size() == 2);
  CHECK(launches[0].header.rows == 200);
  CHECK(launches[1].header.rows == 4);
}

TEST_CASE("a table has shared constants once") {
  Model model = adam();
  for (int i = 0; i < 10; ++i) model.add(100);
  model.add_group();
  for (int i = 0; i < 10; ++i) model.add(100);
  std::swap(model.jobs()[3], model.jobs()[13]);
  const std::vector<Launch> launches = step(model);
  REQUIRE(launches.size() == 1);
  const std::size_t constants = (constants_size(launches[0]) + 7) / 8;
  CHECK(launches[0].words.size() == 20 * (kRowWords + 4) + 2 * constants);
}

TEST_CASE("a table has shared hyperparameters once") {
  Model model = adam();
  model.add_group(true);
  for (int i = 0; i < 10; ++i) model.add(100);
  model.add_group(true);
  for (int i = 0; i < 10; ++i) model.add(100);
  const std::vector<Launch> launches = step(model);
  REQUIRE(launches.size() == 2);
  const std::size_t hypers = info_of(model.rule()).hyper_names.size() + 1;
  CHECK(launches[0].words.size() == 20 * kCounterWords + 2 * hypers);
  CHECK(launches[1].words.size() == 20 * (kRowWords + 4));
}

// -- limits ----------------------------------------------------------------------------------------------------------

TEST_CASE("a table has as many tensors as fit") {
  const std::size_t constants = (info_of(RuleId::adam).constants_size[0] + 7) / 8;
  const std::size_t most = (LargeTable::kWords - constants) / (kRowWords + 4);
  for (const std::size_t tensors : {most - 1, most, most + 1, 2 * most, 5 * most}) {
    Model model = adam();
    for (std::size_t i = 0; i < tensors; ++i) model.add(100 + static_cast<std::int64_t>(i));
    // A row is added only if there is room for constants, too, although it may share those of its neighbour.
    const std::size_t slack = constants / (kRowWords + 4) + 1;
    const std::vector<Launch> launches = step(model);
    CHECK(launches.size() >= (tensors + most - 1) / most);
    CHECK(launches.size() <= (tensors + most - slack - 1) / (most - slack));
  }
}

TEST_CASE("many groups, each with constants of its own") {
  for (const bool counts : {false, true}) {
    Model model = adam();
    for (int group = 0; group < 5000; ++group) {
      model.add_group(counts);
      model.add(group % 100, group % 9 == 0);
      model.add(group % 70, group % 9 == 0);
    }
    CHECK(step(model).size() > 20);
  }
}

TEST_CASE("layouts of as many dimensions as torch has") {
  Model model(RuleId::adam, kMaxStates);
  for (int i = 0; i < 50; ++i) {
    Job& job = model.add(1000).job;
    for (std::size_t k = kFirstFollower; k < kMaxOperands; ++k) job.operands[k] = {model.place(), Format::float32};
    job.master = Master::whole;
    job.layout = model.add_layout(64);
  }
  CHECK(step(model).size() == 9);  // 6 of some 650 words each in a table
}

TEST_CASE("a launch has at most the largest number of blocks") {
  Model model = adam();
  for (int i = 0; i < 7; ++i) model.add(std::int64_t{kChunk} << 29);
  model.add(std::int64_t{kChunk} * 0x7fffffff);
  model.add(1);
  model.add(std::int64_t{kChunk} * 0x7ffffffe);
  model.add(kChunk);
  model.add(kChunk);
  const std::vector<Launch> launches = step(model);
  std::vector<std::uint32_t> blocks;
  for (const Launch& launch : launches) blocks.push_back(launch.header.blocks);
  constexpr std::uint32_t third = 3U << 29;
  CHECK(blocks == std::vector<std::uint32_t>{third, third, 1U << 29, 0x7fffffff, 0x7fffffff, 2});
}

TEST_CASE("more empty tensors that count steps than a 16-bit position can skip") {
  Model model = adam();
  model.add_group(true);
  model.add(10);
  for (int i = 0; i < 30'000; ++i) model.add(0);
  model.add(20);
  const std::vector<Launch> launches = step(model);
  CHECK(launches.back().header.rows == 1);
}

// -- values of the header --------------------------------------------------------------------------------------------

TEST_CASE("jobs that differ in values of the header go to separate tables") {
  Model model = adam();
  const auto add = [&](double factor, bool has_follower, double weight, double clip_value = kNoLimit) {
    Job& job = model.add(100).job;
    job.grad_factor = factor;
    job.clip_value = clip_value;
    job.followers[0] = {.weight = weight, .sets_param = true};
    if (has_follower) job.operands[kFirstFollower] = {model.place(), Format::float32};
  };
  const auto launches = [&] { return step(model).size(); };
  add(1.0, true, 0.5);
  add(-1.0, true, 0.5);
  add(1.0, false, 0.7);
  CHECK(launches() == 1);
  add(0.5, true, 0.5);
  CHECK(launches() == 2);
  add(0.5, true, 0.7);
  CHECK(launches() == 3);
  add(0.5, true, 0.7);
  CHECK(launches() == 3);
  model.add_group(true);
  add(0.5, true, 0.7);
  CHECK(launches() == 5);  // and a counter
  add(0.5, true, 0.7);
  CHECK(launches() == 5);
  model.add_group();
  add(0.5, true, 0.7);
  CHECK(launches() == 6);
  add(0.5, true, 0.7, 1e300);
  CHECK(launches() == 7);
  const Header last = step(model).back().header;
  CHECK(last.clip_value == 1e300);
  CHECK(last.narrow_clip_value == std::numeric_limits<float>::infinity());
}

TEST_CASE("followers with other weights and flags go to separate tables") {
  struct Each {
    Followers followers;
    std::size_t launches;  // of this row and the earlier ones
  };
  const Each table[] = {
      {{Follower{0.3, true}, Follower{0.1, false}}, 1},
      {{}, 1},                                            // no followers
      {{std::nullopt, Follower{0.1, false}}, 1},          // the same as the first row's
      {{Follower{0.3, true}}, 1},                         //
      {{Follower{0.3, false}}, 2},                        // another flag
      {{Follower{0.4, false}}, 3},                        // another weight
      {{Follower{0.4, false}, Follower{0.1, false}}, 4},  // the table has no second one
      {{Follower{0.4, false}, Follower{0.1, true}}, 5},
      {{Follower{0.4, false}, Follower{0.2, true}}, 6},
      {{Follower{0.4, false}, Follower{0.2, true}}, 6},
  };
  Model model = adam();
  for (const auto& [followers, launches] : table) {
    Job& job = model.add(100).job;
    for (std::size_t i = 0; i < kMaxFollowers; ++i) {
      if (!followers[i]) continue;
      job.followers[i] = *followers[i];
      job.operands[kFirstFollower + i] = {model.place(), Format::float32};
    }
    CHECK(step(model).size() == launches);
  }
}

TEST_CASE("the sign of a factor of zero") {
  Model model = adam();
  model.add(100).job.grad_factor = 0.0;
  model.add(100).job.grad_factor = -0.0;
  const std::vector<Launch> launches = step(model);
  REQUIRE(launches.size() == 1);
  CHECK(row_of<Row>(launches[0], 0).maximize == 0);
  CHECK(row_of<Row>(launches[0], 1).maximize == 1);
}

TEST_CASE("every table has the addresses of what a step reads on the GPU") {
  Model model = adam();
  model.add(100);
  model.add(100, true);
  model.add_group(true);
  model.add(100);
  model.add(100, true);
  CHECK(
      step(model, {.grad_scale = pointer(0x1230), .found_inf = pointer(0x4560), .clipping = pointer(0x7890)}).size() ==
      6);
}

// -- alignment -------------------------------------------------------------------------------------------------------

TEST_CASE("where vectors begin, for every misalignment of every operand") {
  using enum Format;
  for (const bool wide : {false, true})
    for (unsigned mix = 0; mix < 4 * 4 * 4; ++mix) {
      Model model(RuleId::lion, 1);
      constexpr std::array formats{float32, float64, bfloat16, float16};
      for (unsigned ahead = 0; ahead < 4 * 4 * 4; ++ahead) {
        Job& job = model.add(100, wide).job;
        for (std::size_t k = 0; k < 3; ++k) {
          job.operands[k].format = formats[mix >> (2 * k) & 3U];
          job.operands[k].data += (ahead >> (2 * k) & 3U) * onepass::size_of(job.operands[k].format);
        }
      }
      step(model);
    }
}

// -- random ----------------------------------------------------------------------------------------------------------

TEST_CASE("random models") {
  constexpr std::array formats{Format::float32, Format::float32, Format::bfloat16, Format::float64};
  for (std::uint64_t seed = 0; seed < 20; ++seed) {
    CAPTURE(seed);
    std::uint64_t calls = 0;
    const auto one_of = [&](std::uint64_t n) { return scramble(1000 * seed + (calls += 1) * 0x9e3779b97f4a7c15U) % n; };
    constexpr std::array rules{RuleId::sgd, RuleId::nadam, RuleId::asgd, RuleId::adam};
    Model model(rules[seed % rules.size()], one_of(5));
    for (int i = 0; i < 600; ++i) {
      if (one_of(10) == 0) model.add_group(one_of(3) == 0);
      Job& job = model.add(static_cast<std::int64_t>(one_of(3) * one_of(20'000)), one_of(4) == 0).job;
      for (Operand& operand : job.operands) {
        if (operand.data == nullptr) continue;
        operand.format = formats[one_of(formats.size())];
        operand.data += onepass::size_of(operand.format) * one_of(3);
      }
      for (std::size_t k = kFirstFollower; k < kMaster; ++k)
        if (one_of(20) == 0) job.operands[k] = {model.place(), Format::float32};
      if (!job.wide && one_of(10) == 0) {
        job.master = one_of(2) == 0 ? Master::whole : Master::low_bits;
        job.operands[kMaster] = {model.place(), job.master == Master::whole ? Format::float32 : Format::bfloat16};
        job.operands[kMaster].data += onepass::size_of(job.operands[kMaster].format) * one_of(3);
      }
      for (Follower& follower : job.followers)
        if (one_of(20) == 0) follower = {.weight = 0.5, .sets_param = one_of(2) == 0};
      if (one_of(20) == 0) job.grad_factor = one_of(2) == 0 ? -1.0 : 0.25;
      if (one_of(10) == 0) job.layout = model.add_layout(2 + one_of(30));
    }
    step(model);
  }
}

// -- errors ----------------------------------------------------------------------------------------------------------

TEST_CASE("an error of a launch is reported, and nothing is launched after it") {
  static int launches;
  Backend failing = kRecorder;
  failing.launch = [](Work, RuleId, bool, const LargeTable&, void*) {
    return ++launches == 2 ? "out of order" : nullptr;
  };
  Model model = adam();
  model.add_group(true);
  model.add(1);
  model.add(1, true);
  launches = 0;
  CHECK_THROWS_WITH_AS(run_step(failing, model.rule(), model.jobs(), {}, kWorkspace, kDevice, kStream),
                       "a kernel could not be launched on cuda:3: out of order", std::runtime_error);
  CHECK(launches == 2);
}

}  // namespace
}  // namespace onepass::testing
