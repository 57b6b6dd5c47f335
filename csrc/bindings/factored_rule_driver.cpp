#include "bindings/factored_rule_driver.h"

#include <array>
#include <cmath>

#include "formats/with_format.h"
#include "layout.h"
#include "rules/adafactor.h"

namespace onepass {
namespace {

// The operands of the states are in the order of the rule's names: kRowVar and kColumnVar of a matrix, then this one.
constexpr std::size_t kVariance = kColumnVar + 1;

// Returns the distance from 1 to the next larger number.
double epsilon_of(Format format) {
  return with_format(format, []<class Codec>(Codec) { return std::ldexp(1.0, 1 - Codec::kSignificantBits); });
}

class FactoredRuleDriver final : public RuleDriver {
 public:
  FactoredRuleDriver() : RuleDriver(adafactor_info()) {}

  std::string unsupported_reason(const TensorView& param) const override {
    return param.complex ? "complex parameter" : "";
  }
  bool runs_on_cuda() const override { return false; }
  bool takes_shards() const override { return false; }
  bool takes_followers() const override { return false; }
  unsigned states_of(unsigned, const TensorView& param) const override {
    return param.ndim > 1 ? Adafactor::kOfMatrix : Adafactor::kOfVector;
  }
  bool state_shape_matches(std::size_t operand, const TensorView& state, const TensorView& param) const override;
  void locate_elements(StepWork& work, Job& job, const Views& views, bool flat) const override;

 private:
  void run_on_cpu(const StepWork& work, int threads) override { run_factored(work.factored_jobs, threads, room_); }
  void run_on_cuda(const StepWork&) override {}

  FactoredRoom room_;
};

bool FactoredRuleDriver::state_shape_matches(std::size_t operand, const TensorView& state,
                                             const TensorView& param) const {
  const int reduced = operand == kRowVar ? param.ndim - 1 : operand == kColumnVar ? param.ndim - 2 : -1;
  if (state.ndim != param.ndim || state.complex != param.complex) return false;
  for (int d = 0; d < param.ndim; ++d)
    if (state.shape[d] != (d == reduced ? 1 : param.shape[d])) return false;
  return true;
}

void FactoredRuleDriver::locate_elements(StepWork& work, Job& job, const Views& views, bool flat) const {
  const TensorView& param = views[kParam];
  const bool matrix = param.ndim > 1;
  FactoredJob& made = work.factored_jobs.emplace_back();
  made.operands = {job.operands[kParam], job.operands[kGrad], job.operands[matrix ? kRowVar : kVariance],
                   job.operands[kColumnVar]};
  made.constants = *static_cast<const AdafactorConstants*>(job.constants);
  if (made.constants.eps1 < 0.0) made.constants.eps1 = epsilon_of(job.operands[kParam].format);
  made.grad_factor = job.grad_factor;
  made.wide = job.wide;
  made.slices = job.length;
  if (job.length == 0) return;

  // The leading dimensions count slices. `strides` are those of each operand along them.
  const auto leading = static_cast<std::size_t>(matrix ? param.ndim - 2 : param.ndim);
  std::array<std::span<const std::int64_t>, kMaxOperands> strides;
  for (std::size_t k = 0; k < kFactoredOperands; ++k) {
    if (made.operands[k].data == nullptr) continue;
    const TensorView& view = views[k == kRowVar && !matrix ? kVariance : k];
    strides[k] = strides_of(view).first(leading);
    if (!matrix) continue;
    made.row_strides[k] = k == kColumnVar ? 0 : view.strides[leading];
    made.column_strides[k] = k == kRowVar ? 0 : view.strides[leading + 1];
  }
  if (matrix) {
    made.rows = param.shape[leading];
    made.columns = param.shape[leading + 1];
    made.slices = job.length / (made.rows * made.columns);
    if (made.slices == 1) return;
  } else if (flat) {
    return;
  }
  Layout layout = make_layout(shape_of(param).first(leading), strides);
  if (!is_flat(layout)) made.batch = &work.layouts.emplace_back(std::move(layout));
}

}  // namespace

std::unique_ptr<RuleDriver> make_factored_rule_driver() { return std::make_unique<FactoredRuleDriver>(); }

}  // namespace onepass
