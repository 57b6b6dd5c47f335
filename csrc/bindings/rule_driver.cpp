#include "bindings/rule_driver.h"

#include <span>

#include "bindings/cuda.h"
#include "bindings/factored_rule_driver.h"
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
    std::array<std::span<const std::int64_t>, kMaxOperands> strides;
    for (std::size_t k = 0; k < kMaxOperands; ++k)
      if (job.operands[k].data != nullptr || k < kFirstState) strides[k] = strides_of(views[k]);
    Layout layout = make_layout(shape_of(views[kParam]), strides);
    if (!is_flat(layout)) job.layout = &work.layouts.emplace_back(std::move(layout));
  }

  void run(const StepWork& work, int threads) override { run_step(rule_, work.jobs, threads); }

  void run_on_cuda(const StepWork& work) override {
    for (const auto& [device, jobs] : work.device_jobs) step_on_cuda(rule_, device, jobs, work.scaler);
  }

 private:
  RuleId rule_;
};

}  // namespace

std::unique_ptr<RuleDriver> make_rule_driver(const std::string& rule) {
  if (rule == adafactor_info().name) return make_factored_rule_driver();
  return std::make_unique<ElementwiseRuleDriver>(find_rule(rule));
}

}  // namespace onepass
