#include "bindings/factored_rule_driver.h"

#include <array>
#include <bit>
#include <cmath>
#include <string_view>

#include "formats/with_format.h"
#include "layout.h"
#include "rules/adafactor.h"
#include "rules/came.h"
#include "rules/states.h"
#include "rules/table.h"

namespace onepass {
namespace {

// A rule's operand is not used.
constexpr std::size_t kNone = kAllOperands;

// The operands of a rule that are those of a FactoredJob, in its order.
using Sources = std::array<std::size_t, kFactoredOperands>;

// Returns the operand of a state that has this name.
template <std::size_t Count>
consteval std::size_t state(const std::array<const char*, Count>& names, std::string_view name) {
  return operand_of_state(static_cast<std::size_t>(std::countr_zero(state_bit(names, name))));
}

struct FactoredRule {
  const RuleInfo& info;
  unsigned states_of_matrix, states_of_vector;
  Sources matrix, vector;

  // Whether a state has one number for each row, or for each column, of a matrix.
  bool is_of_rows(std::size_t operand) const {
    return operand == matrix[kRowVar] || operand == matrix[kResidualRowVar];
  }
  bool is_of_columns(std::size_t operand) const {
    return operand == matrix[kColumnVar] || operand == matrix[kResidualColumnVar];
  }
};

FactoredRule adafactor() {
  constexpr const auto& names = Adafactor::state_names;
  return {.info = adafactor_info(),
          .states_of_matrix = Adafactor::kOfMatrix,
          .states_of_vector = Adafactor::kOfVector,
          .matrix = {kParam, kGrad, state(names, "row_var"), state(names, "col_var"), kNone, kNone, kNone},
          .vector = {kParam, kGrad, state(names, "variance"), kNone, kNone, kNone, kNone}};
}

FactoredRule came() {
  constexpr const auto& names = Came::state_names;
  constexpr std::size_t momentum = state(names, "exp_avg");
  return {.info = came_info(),
          .states_of_matrix = Came::kOfMatrix,
          .states_of_vector = Came::kOfVector,
          .matrix = {kParam, kGrad, state(names, "exp_avg_sq_row"), state(names, "exp_avg_sq_col"), momentum,
                     state(names, "exp_avg_res_row"), state(names, "exp_avg_res_col")},
          .vector = {kParam, kGrad, state(names, "exp_avg_sq"), kNone, momentum, kNone, kNone}};
}

// Returns the distance from 1 to the next larger number.
double epsilon_of(Format format) {
  return with_format(format, []<class Codec>(Codec) { return std::ldexp(1.0, 1 - Codec::kSignificantBits); });
}

class FactoredRuleDriver final : public RuleDriver {
 public:
  explicit FactoredRuleDriver(const FactoredRule& rule) : RuleDriver(rule.info), rule_(rule) {}

  std::string unsupported_reason(const TensorView& param) const override {
    return param.complex ? "complex parameter" : "";
  }
  bool runs_on_cuda() const override { return false; }
  bool takes_shards() const override { return false; }
  bool takes_followers() const override { return false; }
  unsigned states_of(unsigned, const TensorView& param) const override {
    return param.ndim > 1 ? rule_.states_of_matrix : rule_.states_of_vector;
  }
  bool state_shape_matches(std::size_t operand, const TensorView& state, const TensorView& param) const override;
  void locate_elements(StepWork& work, Job& job, const Views& views, bool flat) const override;

 private:
  void run_on_cpu(const StepWork& work, int threads) override { run_factored(work.factored_jobs, threads, room_); }
  void run_on_cuda(const StepWork&) override {}

  const FactoredRule rule_;
  FactoredRoom room_;
};

bool FactoredRuleDriver::state_shape_matches(std::size_t operand, const TensorView& state,
                                             const TensorView& param) const {
  const int reduced = rule_.is_of_rows(operand) ? param.ndim - 1 : rule_.is_of_columns(operand) ? param.ndim - 2 : -1;
  if (state.ndim != param.ndim || state.complex != param.complex) return false;
  for (int d = 0; d < param.ndim; ++d)
    if (state.shape[d] != (d == reduced ? 1 : param.shape[d])) return false;
  return true;
}

void FactoredRuleDriver::locate_elements(StepWork& work, Job& job, const Views& views, bool flat) const {
  const TensorView& param = views[kParam];
  const bool matrix = param.ndim > 1;
  const Sources& sources = matrix ? rule_.matrix : rule_.vector;
  FactoredJob& made = work.factored_jobs.emplace_back();
  for (std::size_t k = 0; k < kFactoredOperands; ++k)
    if (sources[k] != kNone) made.operands[k] = job.operands[sources[k]];
  made.is_came = &rule_.info == &came_info();
  if (made.is_came) {
    made.came = *static_cast<const CameConstants*>(job.constants);
  } else {
    made.adafactor = *static_cast<const AdafactorConstants*>(job.constants);
    if (made.adafactor.eps1 < 0.0) made.adafactor.eps1 = epsilon_of(job.operands[kParam].format);
  }
  made.grad_factor = job.grad_factor;
  made.wide = job.wide;
  made.slices = job.length;
  if (job.length == 0) return;

  // The leading dimensions count slices. `strides` are those of each operand along them.
  const auto leading = static_cast<std::size_t>(matrix ? param.ndim - 2 : param.ndim);
  std::array<std::span<const std::int64_t>, kMaxOperands> strides;
  for (std::size_t k = 0; k < kFactoredOperands; ++k) {
    if (made.operands[k].data == nullptr) continue;
    const TensorView& view = views[sources[k]];
    strides[k] = strides_of(view).first(leading);
    if (!matrix) continue;
    made.row_strides[k] = rule_.is_of_columns(sources[k]) ? 0 : view.strides[leading];
    made.column_strides[k] = rule_.is_of_rows(sources[k]) ? 0 : view.strides[leading + 1];
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

std::unique_ptr<RuleDriver> make_factored_rule_driver(const std::string& rule) {
  for (const FactoredRule& known : {adafactor(), came()})
    if (rule == known.info.name) return std::make_unique<FactoredRuleDriver>(known);
  return nullptr;
}

}  // namespace onepass
