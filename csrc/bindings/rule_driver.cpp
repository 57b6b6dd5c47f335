#include "bindings/rule_driver.h"

#include <algorithm>
#include <cstring>
#include <iterator>
#include <optional>
#include <span>
#include <vector>

#include "bindings/cuda.h"
#include "bindings/factored_rule_driver.h"
#include "bindings/ownership.h"
#include "bindings/torch.h"
#include "cpu/step.h"
#include "layout.h"

namespace onepass {
namespace {

class ElementwiseRuleDriver final : public RuleDriver {
 public:
  explicit ElementwiseRuleDriver(RuleId rule) : RuleDriver(info_of(rule)), rule_(rule) {}

  std::string unsupported_reason(const TensorView&) const override { return {}; }
  bool runs_on_cuda() const override { return true; }
  bool takes_shards() const override { return true; }
  bool takes_followers() const override { return true; }
  unsigned states_of(unsigned used, const TensorView&) const override { return used; }
  bool state_shape_matches(std::size_t, const TensorView& state, const TensorView& param) const override {
    return same_shape(state, param);
  }

  void locate_elements(StepWork& work, Job& job, const Views& views, bool flat) const override {
    if (flat || job.length == 0) return;
    std::size_t order = kParam;
    for (std::size_t s = 0; s < kMaxStates; ++s)
      if (job.blocks.scales[s] != nullptr) order = kFirstState + s;
    std::array<std::span<const std::int64_t>, kMaxOperands> strides;
    for (std::size_t k = 0; k < kMaxOperands; ++k)
      if (job.operands[k].data != nullptr || k < kFirstState) strides[k] = strides_of(views[k]);
    Layout layout = make_layout(shape_of(views[kParam]), strides, order);
    if (!is_flat(layout)) job.layout = &work.layouts.emplace_back(std::move(layout));
  }

 private:
  void add_up_shards(StepWork& work, int threads) const override {
    if (!work.summed_shards.contains(-1)) return;
    std::vector<Job> shards;
    std::ranges::copy_if(work.jobs, std::back_inserter(shards), [](const Job& job) { return job.whole != 0; });
    std::vector<double> sums;
    run_without_python(work.bytes(), work.used, [&] { sums = sum_shards(rule_, shards, threads); });
    const std::size_t bytes = sums.size() * sizeof(double);
    const Workspace workspace(bytes, -1);
    std::memcpy(workspace.data, sums.data(), bytes);
    torch().add_up_sums(work.summed_shards_on(-1), workspace.tensor);
    std::memcpy(sums.data(), workspace.data, bytes);
    const double* own = sums.data();
    for (Job& job : work.jobs) {
      if (job.whole == 0) continue;
      complete_shard(rule_, job, own, work.constants.emplace_back());
      own += info().sums;
    }
  }

  void run_on_cpu(const StepWork& work, int threads) override { run_step(rule_, work.jobs, threads); }

  void run_on_cuda(const StepWork& work) override {
    for (const auto& [device, jobs] : work.device_jobs)
      step_on_cuda(rule_, device, jobs, work.inputs, work.used,
                   [&, device = device] { return work.summed_shards_on(device); });
  }

  RuleId rule_;
};

void write(const Scalar& scalar) {
  if (scalar.data == nullptr) return;
  const double exact = scalar.late != nullptr ? *scalar.late : scalar.value;
  if (scalar.format == Format::float32) {
    const auto value = static_cast<float>(exact);
    std::memcpy(scalar.data, &value, sizeof value);
  } else {
    std::memcpy(scalar.data, &exact, sizeof exact);
  }
}

}  // namespace

void RuleDriver::run(StepWork& work, int threads) {
  // Communicating, or launching on a GPU, may run Python code. References keep the memory of what is stepped after it
  // valid.
  std::optional<Owned> owned;
  if (!work.summed_shards.empty() || work.device_jobs.size() + (work.jobs.empty() ? 0 : 1) > 1)
    owned.emplace(work.used);
  add_up_shards(work, threads);
  run_on_cuda(work);
  run_without_python(work.bytes(), work.used, [&] {
    work.coalesce_rows();
    run_on_cpu(work, threads);
    for (const Scalar& scalar : work.scalars) write(scalar);
  });
}

std::unique_ptr<RuleDriver> make_rule_driver(const std::string& rule) {
  if (auto factored = make_factored_rule_driver(rule)) return factored;
  return std::make_unique<ElementwiseRuleDriver>(find_rule(rule));
}

}  // namespace onepass
