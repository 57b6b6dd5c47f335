#include "cuda/step.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <iterator>
#include <limits>
#include <optional>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>

#include "rules/table.h"

namespace onepass::cuda {
namespace {

constexpr std::uint64_t kMaxBlocks = 0x7fffffff;  // of one launch

// Elements that a block sums. The same in every step, so that a tensor's sums do not depend on what else is stepped:
// processes that have the same tensor beside other ones get the same bits.
constexpr std::uint32_t kSummedChunk = 4096;

std::uint64_t address(const void* pointer) { return reinterpret_cast<std::uintptr_t>(pointer); }

std::size_t constants_words(RuleId rule, bool wide) {
  return (info_of(rule).constants_size[wide ? 1 : 0] + sizeof(std::uint64_t) - 1) / sizeof(std::uint64_t);
}

// Collects rows (or counters) and the words that they point to, until a table is full.
template <class RowType>
class Builder {
 public:
  bool empty() const { return rows_.empty(); }

  // Whether another row that adds this many words and blocks fits.
  bool fits(std::size_t words, std::uint64_t blocks = 0) const {
    return (rows_.size() + 1) * kRowWords + words_.size() + words <= LargeTable::kWords &&
           blocks_ + blocks <= kMaxBlocks;
  }

  // Adds words, and returns their position among the added words.
  std::uint16_t add(std::span<const std::uint64_t> words) {
    const auto at = static_cast<std::uint16_t>(words_.size());
    words_.insert(words_.end(), words.begin(), words.end());
    return at;
  }

  // The same for words that several rows share: `make` is called for the first of these rows.
  template <class Make>
  std::uint16_t add_shared(const void* what, Make&& make) {
    if (!shared_.empty() && shared_.back().first == what) return shared_.back().second;  // neighbours are often alike
    const auto known = std::ranges::find(shared_, what, &std::pair<const void*, std::uint16_t>::first);
    if (known != shared_.end()) return known->second;
    return shared_.emplace_back(what, add(make())).second;
  }

  void push(const RowType& row, std::uint64_t blocks = 0) {
    rows_.push_back(row);
    blocks_ += blocks;
  }

  std::uint64_t blocks() const { return blocks_; }

  // Returns the table, and begins a new one.
  const LargeTable& close(const Header& header) {
    const auto rows = static_cast<std::uint16_t>(rows_.size() * kRowWords);
    for (RowType& row : rows_) shift(row, rows, header.workspace == 0);
    table_.header = header;
    table_.header.rows = static_cast<std::uint32_t>(rows_.size());
    table_.header.blocks = static_cast<std::uint32_t>(blocks_);
    table_.header.words = static_cast<std::uint32_t>(rows + words_.size());
    std::memcpy(table_.words, rows_.data(), rows_.size() * sizeof(RowType));
    std::ranges::copy(words_, table_.words + rows);
    rows_.clear();
    words_.clear();
    shared_.clear();
    blocks_ = 0;
    return table_;
  }

 private:
  static constexpr std::size_t kRowWords = sizeof(RowType) / sizeof(std::uint64_t);

  // The words that a row points to are after all rows.
  static void shift(Row& row, std::uint16_t rows, bool has_constants) {
    row.pointers = static_cast<std::uint16_t>(row.pointers + rows);
    if (has_constants) row.constants = static_cast<std::uint16_t>(row.constants + rows);
    row.layout = static_cast<std::uint16_t>(row.layout + rows);
  }
  static void shift(Counter& counter, std::uint16_t rows, bool /*has_constants*/) {
    counter.hyper = static_cast<std::uint16_t>(counter.hyper + rows);
  }

  std::vector<RowType> rows_;
  std::vector<std::uint64_t> words_;
  std::vector<std::pair<const void*, std::uint16_t>> shared_;
  std::uint64_t blocks_ = 0;
  LargeTable table_;
};

// -- counters --------------------------------------------------------------------------------------------------------

std::uint64_t number_word(const Number& number) {
  return number.data != nullptr ? address(number.data) : std::bit_cast<std::uint64_t>(number.value);
}

std::uint64_t number_format(const Number& number) {
  return number.data != nullptr ? static_cast<std::uint64_t>(number.format) : kValue;
}

std::vector<std::uint64_t> hyper_words(RuleId rule, const std::array<Number, kMaxHyper>& hyper) {
  std::vector<std::uint64_t> words;
  std::uint64_t formats = 0;
  for (std::size_t h = 0; h < info_of(rule).hyper_names.size(); ++h) {
    words.push_back(number_word(hyper[h]));
    formats |= number_format(hyper[h]) << (4 * h);
  }
  words.push_back(formats);
  return words;
}

Counter counter_of(const DeviceJob& job) {
  Counter counter{};
  for (std::size_t n = 0; n < job.numbers.size(); ++n) {
    counter.numbers[n] = number_word(job.numbers[n]);
    counter.formats = static_cast<std::uint16_t>(counter.formats | number_format(job.numbers[n]) << (4 * n));
  }
  return counter;
}

// -- rows ------------------------------------------------------------------------------------------------------------

// The operands that are aligned if vectors begin `phase` elements behind the first, and their bytes.
struct Aligned {
  std::uint16_t operands = 0;
  std::size_t bytes = 0;
};

Aligned aligned_from(const Job& job, unsigned width, unsigned phase) {
  Aligned aligned;
  for (std::size_t k = 0; k < kMaxOperands; ++k) {
    const Operand& operand = job.operands[k];
    const std::size_t size = size_of(operand.format);
    if (operand.data == nullptr || (address(operand.data) / size + phase) % width != 0) continue;
    aligned.operands = static_cast<std::uint16_t>(aligned.operands | 1U << k);
    aligned.bytes += size;
  }
  return aligned;
}

// Chooses where the vectors of a row begin: where the operands that are then aligned have the most bytes. Each operand
// may have another misalignment.
void align(const Job& job, unsigned width, Row& row) {
  std::size_t most = 0;
  for (unsigned phase = 0; phase < width && row.aligned != row.held; ++phase) {
    const Aligned aligned = aligned_from(job, width, phase);
    if (aligned.bytes <= most) continue;
    most = aligned.bytes;
    row.phase = static_cast<std::uint8_t>(phase);
    row.aligned = aligned.operands;
  }
}

bool has_followers(const Job& job) {
  return std::any_of(job.operands.begin() + kFirstFollower, job.operands.begin() + kMaster,
                     [](const Operand& operand) { return operand.data != nullptr; });
}

// Returns how to access a job whose operands are all aligned: by vectors if the kernels have its combination of one
// format for parameter and gradient and one format for the states.
Access access_of(const Job& job) {
  const auto all = [&](std::size_t first, std::size_t past, Format format) {
    for (std::size_t k = first; k < past; ++k)
      if (job.operands[k].data != nullptr && job.operands[k].format != format) return false;
    return true;
  };
  const auto are = [&](Format own, Format states) {
    return all(0, kFirstState, own) && all(kFirstState, kFirstFollower, states);
  };
  if (has_followers(job) || job.master != Master::none) return Access::mixed;
  if (job.wide) return are(Format::float64, Format::float64) ? Access::plain : Access::mixed;
  if (are(Format::float32, Format::float32)) return Access::plain;
  if (are(Format::bfloat16, Format::bfloat16)) return Access::bfloat16;
  if (are(Format::float16, Format::float16)) return Access::float16;
  if (are(Format::float32, Format::bfloat16)) return Access::bfloat16_states;
  if (are(Format::bfloat16, Format::float32)) return Access::float32_states;
  return Access::mixed;
}

bool is_stochastic(const Job& job) { return job.blocks.row_length != 0 || job.rounding.stochastic; }

// Returns the length of the rows in which blocks of 32 elements begin anew.
std::int64_t row_length_of(const Job& job) {
  return job.blocks.row_length != 0 ? job.blocks.row_length : std::max<std::int64_t>(job.length, 1);
}

// Sets how a row that is rounded with random bits is read: by vectors, if every operand has them at each block of 32
// elements, and nothing but the rule's update is made.
void set_stochastic_access(const Job& job, Row& row) {
  row.access = Access::stochastic;
  constexpr std::int64_t width = 16 / sizeof(float);
  const bool one_row = row_length_of(job) == job.length;
  if (job.layout != nullptr || job.master != Master::none || has_followers(job) ||
      (!one_row && job.blocks.row_length % width != 0))
    return;
  for (std::size_t k = 0; k < kFirstFollower; ++k) {
    const Operand& operand = job.operands[k];
    const std::size_t size = onepass::size_of(operand.format);
    if (operand.data != nullptr && size <= sizeof(float) && address(operand.data) % (size * width) == 0)
      row.aligned = static_cast<std::uint16_t>(row.aligned | 1U << k);
  }
}

Row row_of(const Job& job) {
  const std::size_t native = job.wide ? sizeof(double) : sizeof(float);
  Row row{};
  row.length = job.length;
  row.maximize = std::signbit(job.grad_factor) ? 1 : 0;
  row.zeroes_grad = job.zeroes_grad ? 1 : 0;
  row.master = job.master;
  bool narrow = true;
  for (std::size_t k = 0; k < kMaxOperands; ++k) {
    const Operand& operand = job.operands[k];
    if (operand.data == nullptr) continue;
    row.held = static_cast<std::uint16_t>(row.held | 1U << k);
    if (k != kMaster) row.formats |= static_cast<std::uint32_t>(operand.format) << (4 * k);
    narrow = narrow && onepass::size_of(operand.format) <= native;
  }
  if (is_stochastic(job)) {
    set_stochastic_access(job, row);
  } else if (job.layout != nullptr || !narrow || (job.master != Master::none && has_followers(job))) {
    row.access = Access::elements;
  } else {
    align(job, static_cast<unsigned>(16 / native), row);
    row.access = row.aligned == row.held ? access_of(job) : Access::mixed;
  }
  return row;
}

// The addresses of the operands that a job has.
class Pointers {
 public:
  explicit Pointers(const Job& job) {
    for (const Operand& operand : job.operands)
      if (operand.data != nullptr) words_[count_++] = address(operand.data);
  }
  std::span<const std::uint64_t> words() const { return {words_.data(), count_}; }

 private:
  std::array<std::uint64_t, kMaxOperands> words_{};
  std::size_t count_ = 0;
};

// Returns the number of dimensions, the shape, and the strides of each operand that the job has.
std::vector<std::uint64_t> layout_words(const Job& job) {
  std::vector<std::uint64_t> words;
  if (job.layout == nullptr) return words;
  const auto add = [&](std::span<const std::int64_t> numbers) {
    for (const std::int64_t number : numbers) words.push_back(static_cast<std::uint64_t>(number));
  };
  words.push_back(job.layout->shape.size());
  add(job.layout->shape);
  for (std::size_t k = 0; k < kMaxOperands; ++k)
    if (job.operands[k].data != nullptr) add(job.layout->strides[k]);
  return words;
}

std::vector<std::uint64_t> constants_of(RuleId rule, const Job& job) {
  std::vector<std::uint64_t> words(constants_words(rule, job.wide));
  std::memcpy(words.data(), job.constants, info_of(rule).constants_size[job.wide ? 1 : 0]);
  return words;
}

// Whether the followers of a table's header are those of this job.
bool follows_as(const Job& job, const Header& header) {
  for (std::size_t i = 0; i < kMaxFollowers; ++i)
    if (job.operands[kFirstFollower + i].data != nullptr && job.followers[i] != header.followers[i]) return false;
  return true;
}

template <class Words>
std::vector<std::uint64_t> as_words(const Words& words) {
  std::vector<std::uint64_t> all(sizeof words / sizeof(std::uint64_t));
  std::memcpy(all.data(), &words, sizeof words);
  return all;
}

// Returns the words of a job that is rounded with random bits; none for other jobs. `job`: that of `device_job`, or its
// summed_job.
std::vector<std::uint64_t> stochastic_words(const DeviceJob& device_job, const Job& job, bool counts_steps) {
  const Rounding& rounding = job.rounding;
  if (!is_stochastic(job)) return {};
  const Number& counted = device_job.numbers[0];
  const bool is_counted_there = counts_steps && device_job.hyper != nullptr;
  StochasticWords words{.scales = {},
                        .row_length = static_cast<std::uint64_t>(row_length_of(job)),
                        .rounds = 0,
                        .first = static_cast<std::uint64_t>(rounding.first),
                        .seed = rounding.seed,
                        .param = rounding.param,
                        .step = rounding.step,
                        .step_format = kValue};
  if (is_counted_there && counted.data != nullptr) {
    words.step = address(counted.data);
    words.step_format = static_cast<std::uint64_t>(counted.format);
  } else if (is_counted_there) {
    words.step = static_cast<std::uint64_t>(counted.value) + 1;
  }
  for (std::size_t s = 0; s < kMaxStates; ++s) words.scales[s] = address(job.blocks.scales[s]);
  for (std::size_t k = 0; k < kFirstFollower; ++k)
    if (job.rounds(k)) words.rounds |= std::uint64_t{1} << k;
  return as_words(words);
}

// Returns the words of a job over which sums are made, with the addresses of its blocks' sums and of its own.
std::vector<std::uint64_t> sum_words(const DeviceJob& device_job, std::uint64_t sums, std::uint64_t totals) {
  SumWords words{.sums = sums, .totals = totals, .scalars = {}, .formats = 0};
  for (std::size_t s = 0; s < kMaxScalars; ++s) {
    words.scalars[s] = number_word(device_job.numbers[1 + s]);
    words.formats |= number_format(device_job.numbers[1 + s]) << (4 * s);
  }
  return as_words(words);
}

// Returns the job with nothing but what sums are made of.
Job summed_job(Job job) {
  for (std::size_t k = kFirstFollower; k < kMaster; ++k) job.operands[k] = {};
  job.rounding = {};
  job.zeroes_grad = false;
  return job;
}

// Returns the row of such a job. Its vectors begin at its first element, wherever that is in memory.
Row summed_row_of(const Job& job) {
  Row row = row_of(job);
  if (row.access == Access::stochastic) return row;
  row.phase = 0;
  row.aligned = aligned_from(job, static_cast<unsigned>(16 / (job.wide ? sizeof(double) : sizeof(float))), 0).operands;
  return row;
}

// Returns the number of chunks of a job that is rounded with random bits.
std::uint64_t stochastic_chunks_of(const Job& job, std::uint32_t chunk) {
  const std::int64_t row_length = row_length_of(job);
  const std::int64_t in_row = (row_length + kBlockLength - 1) / kBlockLength;
  const std::int64_t in_chunk = chunk / kBlockLength;
  return static_cast<std::uint64_t>((job.length / row_length * in_row + in_chunk - 1) / in_chunk);
}

// Whether the sums that a job depends on are over a tensor of which it is a shard.
bool is_summed_shard(const Job& job) { return job.takes_sums && job.whole != 0; }

// Returns the bytes of a rule's sums.
std::size_t sums_size(RuleId rule) { return info_of(rule).sums * sizeof(double); }

// Returns the number of blocks of a row over which sums are made.
std::uint64_t summed_blocks_of(const Job& job) {
  if (job.blocks.row_length != 0) return std::max<std::uint64_t>(stochastic_chunks_of(job, kSummedChunk), 1);
  return static_cast<std::uint64_t>((std::max<std::int64_t>(job.length, 1) + kSummedChunk - 1) / kSummedChunk);
}

// Returns the number of blocks of a row.
std::uint64_t blocks_of(const Job& job, const Row& row, std::uint32_t chunk) {
  if (row.access == Access::stochastic) return stochastic_chunks_of(job, chunk);
  return static_cast<std::uint64_t>((std::max<std::int64_t>(row.length - row.phase, 1) + chunk - 1) / chunk);
}

// -- launches --------------------------------------------------------------------------------------------------------

void check(const char* error, int device) {
  if (error != nullptr)
    throw std::runtime_error("a kernel could not be launched on cuda:" + std::to_string(device) + ": " + error);
}

struct Step {
  const Backend& backend;
  RuleId rule;
  std::span<const DeviceJob> jobs;
  Header common;  // of all tables
  int device;
  void* stream;

  void launch(Work work, bool wide, const LargeTable& table) const {
    check(backend.launch(work, rule, wide, table, stream), device);
  }

  // Returns the position of a job's constants that are made on the GPU, in words from the beginning of the table's
  // workspace.
  static std::uint16_t offset(std::uint64_t constants, const Header& header) {
    return static_cast<std::uint16_t>((constants - header.workspace) / sizeof(std::uint64_t));
  }

  // Whether this position fits a row's 16 bits. Empty tensors have constants but no row, and there may be any number of
  // them between two rows.
  static bool reaches(std::uint64_t constants, const Header& header) {
    return (constants - header.workspace) / sizeof(std::uint64_t) <= std::numeric_limits<std::uint16_t>::max();
  }

  // Makes the constants of all jobs of this arithmetic type that have them made on the GPU, and counts the steps that
  // are counted there, unless `only_prepares`.
  void count(bool wide, std::uint64_t workspace, bool only_prepares = false) const {
    const std::size_t slot = constants_words(rule, wide) * sizeof(std::uint64_t);
    Builder<Counter> counters;
    Header header;
    const auto flush = [&] {
      if (!counters.empty()) launch(Work::prepare, wide, counters.close(header));
    };
    for (const DeviceJob& device_job : jobs) {
      if (device_job.hyper == nullptr || device_job.job.wide != wide) continue;
      if (!counters.fits(kMaxHyper + 1)) flush();
      if (counters.empty()) {
        header = common;
        header.workspace = workspace;
        header.only_prepares = only_prepares ? 1 : 0;
      }
      Counter counter = counter_of(device_job);
      counter.hyper = counters.add_shared(device_job.hyper, [&] { return hyper_words(rule, *device_job.hyper); });
      counter.constants = offset(workspace, header);
      counters.push(counter);
      workspace += slot;
    }
    flush();
  }

  // Launches one kind of work for all jobs of this arithmetic type that have it. Work::sum: sums over tensors, after
  // which their constants are completed. Work::total: sums over shards. Work::complete: shards' constants are
  // completed. `totals`: where the sums over shards begin. Returns the address behind the blocks' sums, which begin at
  // `sums`.
  std::uint64_t launch_all(Work work, bool wide, std::uint64_t workspace, std::uint64_t totals = 0,
                           std::uint64_t sums = 0) const {
    const std::size_t slot = constants_words(rule, wide) * sizeof(std::uint64_t);
    const bool sums_up = work == Work::sum || work == Work::total;
    Builder<Row> rows;
    Header header;
    const auto flush = [&] {
      if (rows.empty()) return;
      const LargeTable& table = rows.close(header);
      if (sums_up) launch(Work::sum, wide, table);
      launch(work == Work::sum ? Work::complete : work, wide, table);
    };
    for (const DeviceJob& device_job : jobs) {
      const auto& [own, hyper, numbers] = device_job;
      const std::uint64_t total = is_summed_shard(own) ? std::exchange(totals, totals + sums_size(rule)) : 0;
      if (own.wide != wide) continue;
      const std::uint64_t constants = hyper != nullptr ? std::exchange(workspace, workspace + slot) : 0;
      if (!takes_part(work, own)) continue;
      std::optional<Job> summed;
      if (sums_up || work == Work::complete) summed = summed_job(own);
      const Job& job = summed ? *summed : own;
      Row row = summed ? summed_row_of(job) : row_of(job);
      const Pointers pointers(job);
      const std::vector<std::uint64_t> layout = layout_words(job);
      std::vector<std::uint64_t> extra = stochastic_words(device_job, job, info_of(rule).counts_steps);
      std::uint64_t blocks = summed ? summed_blocks_of(job) : blocks_of(job, row, common.chunk);
      if (sums_up) {
        std::ranges::copy(sum_words(device_job, sums, total), std::back_inserter(extra));
        sums += blocks * sums_size(rule);
      } else if (summed) {  // the whole tensor, as one block whose sums are known
        std::ranges::copy(sum_words(device_job, total, 0), std::back_inserter(extra));
        row.length = job.whole;
        blocks = 1;
      }
      // The header of a table holds for all of its rows.
      const bool alike = std::abs(job.grad_factor) == header.grad_factor && job.clip_value == header.clip_value &&
                         follows_as(job, header) && (hyper != nullptr) == (header.workspace != 0);
      if (!alike || !reaches(constants, header) ||
          !rows.fits(pointers.words().size() + extra.size() + layout.size() + slot / sizeof(std::uint64_t), blocks))
        flush();
      if (rows.empty()) {
        header = common;
        if (summed) header.chunk = kSummedChunk;
        header.grad_factor = std::abs(job.grad_factor);
        header.clip_value = job.clip_value;
        header.narrow_clip_value = job.clip_value_as<float>();
        std::ranges::copy(job.followers, header.followers);
        header.workspace = constants;
      }
      row.first_block = static_cast<std::uint32_t>(rows.blocks());
      row.pointers = rows.add(pointers.words());
      rows.add(extra);
      row.has_layout = job.layout != nullptr ? 1 : 0;
      row.layout = rows.add(layout);
      row.constants = hyper != nullptr ? offset(constants, header)
                                       : rows.add_shared(job.constants, [&] { return constants_of(rule, job); });
      rows.push(row, blocks);
    }
    flush();
    return sums;
  }

  // Sums over an empty tensor are zero, and its scalars are advanced.
  static bool takes_part(Work work, const Job& job) {
    if (work == Work::sum) return job.takes_sums && !is_summed_shard(job);
    if (work == Work::total || work == Work::complete) return is_summed_shard(job);
    return job.length > 0 && is_stochastic(job) == (work == Work::step_stochastic);
  }
};

std::size_t constants_size(RuleId rule, std::span<const DeviceJob> jobs, bool wide) {
  const auto counted =
      std::ranges::count_if(jobs, [&](const DeviceJob& job) { return job.hyper != nullptr && job.job.wide == wide; });
  return static_cast<std::size_t>(counted) * constants_words(rule, wide) * sizeof(std::uint64_t);
}

bool take_sums(std::span<const DeviceJob> jobs) {
  return std::ranges::any_of(jobs, [](const DeviceJob& job) { return job.job.takes_sums; });
}

std::uint32_t chunk_of(const Backend& backend, std::span<const DeviceJob> jobs, int device) {
  std::int64_t elements = 0;
  for (const DeviceJob& job : jobs) elements += job.job.length;
  return chunk_length(elements, backend.multiprocessors(device));
}

}  // namespace

std::size_t workspace_size(RuleId rule, std::span<const DeviceJob> jobs) {
  std::size_t size = constants_size(rule, jobs, false) + constants_size(rule, jobs, true);
  if (!take_sums(jobs)) return size;
  for (const DeviceJob& job : jobs)
    if (job.job.takes_sums) size += summed_blocks_of(job.job) * sums_size(rule);
  return size + totals_size(rule, jobs);
}

std::size_t totals_size(RuleId rule, std::span<const DeviceJob> jobs) {
  const auto shards = std::ranges::count_if(jobs, [](const DeviceJob& job) { return is_summed_shard(job.job); });
  return static_cast<std::size_t>(shards) * sums_size(rule);
}

std::uint32_t chunk_length(std::int64_t elements, int multiprocessors) {
  constexpr std::int64_t kBlocksForEach = 32;
  std::uint32_t chunk = 16384;
  while (chunk > 4096 && elements / chunk < kBlocksForEach * multiprocessors) chunk /= 2;
  return chunk;
}

void run_step(const Backend& backend, RuleId rule, std::span<const DeviceJob> jobs, const Inputs& inputs,
              std::byte* workspace, int device, void* stream, const std::function<void()>& add_up_totals) {
  Step step{.backend = backend, .rule = rule, .jobs = jobs, .common = {}, .device = device, .stream = stream};
  step.common.chunk = chunk_of(backend, jobs, device);
  step.common.grad_scale = address(inputs.grad_scale);
  step.common.found_inf = address(inputs.found_inf);
  step.common.clipping = address(inputs.clipping);

  const std::uint64_t totals = address(workspace);
  const std::uint64_t narrow = totals + totals_size(rule, jobs);
  const std::uint64_t wide = narrow + constants_size(rule, jobs, false);
  std::uint64_t sums = wide + constants_size(rule, jobs, true);
  if (narrow != totals) {  // nothing is counted or written before the sums over shards are known
    step.count(false, narrow, true);
    step.count(true, wide, true);
    sums = step.launch_all(Work::total, false, narrow, totals, sums);
    sums = step.launch_all(Work::total, true, wide, totals, sums);
    add_up_totals();
  }
  step.count(false, narrow);
  step.count(true, wide);
  if (take_sums(jobs)) {
    sums = step.launch_all(Work::sum, false, narrow, totals, sums);
    step.launch_all(Work::sum, true, wide, totals, sums);
    step.launch_all(Work::complete, false, narrow, totals);
    step.launch_all(Work::complete, true, wide, totals);
  }
  step.launch_all(Work::step, false, narrow);
  step.launch_all(Work::step_stochastic, false, narrow);
  step.launch_all(Work::step, true, wide);
}

namespace {

std::uint32_t chunk_of(const Backend& backend, std::span<const Job> gradients, int device) {
  std::int64_t elements = 0;
  for (const Job& gradient : gradients) elements += gradient.length;
  return chunk_length(elements, backend.multiprocessors(device));
}

}  // namespace

std::size_t measures_size(const Backend& backend, std::span<const Job> gradients, int device) {
  const std::uint32_t chunk = chunk_of(backend, gradients, device);
  std::uint64_t blocks = 0;
  for (const Job& gradient : gradients)
    if (gradient.length > 0) blocks += blocks_of(gradient, row_of(gradient), chunk);
  return blocks * sizeof(double);
}

void run_measures(const Backend& backend, Measure what, std::span<const Job> gradients, const NormLimits& limits,
                  double grad_factor, const Inputs& inputs, std::byte* measures, int device, void* stream) {
  const Work work = what == Measure::sum_of_squares ? Work::sum_of_squares : Work::largest_magnitude;
  const std::uint32_t chunk = chunk_of(backend, gradients, device);
  std::uint64_t measured = 0;  // blocks
  for (const bool wide : {false, true}) {
    Builder<Row> rows;
    const auto flush = [&] {
      if (rows.empty()) return;
      Header header;
      header.chunk = chunk;
      header.workspace = address(measures) + measured * sizeof(double);
      measured += rows.blocks();
      check(backend.launch(work, RuleId{}, wide, rows.close(header), stream), device);
    };
    for (const Job& gradient : gradients) {
      if (gradient.wide != wide || gradient.length == 0) continue;
      Row row = row_of(gradient);
      const Pointers pointers(gradient);
      const std::vector<std::uint64_t> layout = layout_words(gradient);
      const std::uint64_t blocks = blocks_of(gradient, row, chunk);
      if (!rows.fits(pointers.words().size() + layout.size(), blocks)) flush();
      row.first_block = static_cast<std::uint32_t>(rows.blocks());
      row.pointers = rows.add(pointers.words());
      row.has_layout = gradient.layout != nullptr ? 1 : 0;
      row.layout = rows.add(layout);
      rows.push(row, blocks);
    }
    flush();
  }
  const Decision decision{.what = what,
                          .skips_nonfinite = limits.skips_nonfinite,
                          .count = static_cast<std::uint32_t>(measured),
                          .measures = address(measures),
                          .grad_scale = address(inputs.grad_scale),
                          .found_inf = address(inputs.found_inf),
                          .clipping = address(inputs.clipping),
                          .grad_factor = grad_factor,
                          .max_norm = limits.max_norm};
  check(backend.decide(decision, stream), device);
}

}  // namespace onepass::cuda
