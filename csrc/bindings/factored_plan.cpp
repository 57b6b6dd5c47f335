#include "bindings/factored_plan.h"

#include <array>
#include <cmath>

#include "formats/with_format.h"
#include "layout.h"

namespace onepass {
namespace {

// States, a bit for each, in the order of the rule's names: those of a matrix are operands kRowVar and kColumnVar.
constexpr std::size_t kVariance = kColumnVar + 1;
constexpr unsigned kOfMatrix = 0b011;
constexpr unsigned kOfVector = 0b100;

// The distance from 1 to the next number.
double epsilon_of(Format format) {
  return with_format(format, []<class Codec>(Codec) { return std::ldexp(1.0, 1 - Codec::kSignificantBits); });
}

}  // namespace

FactoredPlan::FactoredPlan() : Plan(adafactor_info()) {}

std::string FactoredPlan::declines(const TensorView& param) const {
  return param.complex ? "complex parameter" : std::string();
}

bool FactoredPlan::runs_on_cuda() const { return false; }

bool FactoredPlan::takes_shards() const { return false; }

unsigned FactoredPlan::states_of(unsigned, const TensorView& param) const {
  return param.ndim > 1 ? kOfMatrix : kOfVector;
}

bool FactoredPlan::fits(std::size_t operand, const TensorView& view, const TensorView& param) const {
  const int reduced = operand == kRowVar ? param.ndim - 1 : operand == kColumnVar ? param.ndim - 2 : -1;
  if (view.ndim != param.ndim || view.complex != param.complex) return false;
  for (int d = 0; d < param.ndim; ++d)
    if (view.shape[d] != (d == reduced ? 1 : param.shape[d])) return false;
  return true;
}

void FactoredPlan::place(Job& job, const std::array<TensorView, kMaxOperands>& views, bool flat) {
  const TensorView& param = views[kParam];
  const bool matrix = param.ndim > 1;
  FactoredJob& made = factored_.emplace_back();
  made.operands = {job.operands[kParam], job.operands[kGrad], job.operands[matrix ? kRowVar : kVariance],
                   job.operands[kColumnVar]};
  made.constants = *static_cast<const AdafactorConstants*>(job.constants);
  if (made.constants.eps1 < 0.0) made.constants.eps1 = epsilon_of(job.operands[kParam].format);
  made.grad_factor = job.grad_factor;
  made.wide = job.wide;
  made.slices = job.length;
  if (job.length == 0) return;

  // The dimensions that count slices, and how each operand goes along them.
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
  if (!is_flat(layout)) made.batch = &layouts_.emplace_back(std::move(layout));
}

bool FactoredPlan::blends() const { return false; }

void FactoredPlan::launch(std::span<const Job>, int threads) { run_factored(factored_, threads, room_); }

void FactoredPlan::clear() {
  factored_.clear();
  Plan::clear();
}

}  // namespace onepass
