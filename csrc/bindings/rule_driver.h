// The differences between the two kinds of rules, element-wise and factored.
#pragma once

#include <array>
#include <cstddef>
#include <memory>
#include <string>

#include "bindings/dlpack.h"
#include "bindings/step_work.h"
#include "job.h"
#include "rules/table.h"

namespace onepass {

using Views = std::array<TensorView, kAllOperands>;

class RuleDriver {
 public:
  explicit RuleDriver(const RuleInfo& info) : info_(info) {}
  virtual ~RuleDriver() = default;
  RuleDriver(const RuleDriver&) = delete;
  RuleDriver& operator=(const RuleDriver&) = delete;

  const RuleInfo& info() const { return info_; }

  // Returns why torch's implementation has to step a parameter; empty if kernels can.
  virtual std::string unsupported_reason(const TensorView& param) const = 0;
  virtual bool runs_on_cuda() const = 0;
  virtual bool takes_shards() const = 0;  // whether kernels step the local part of a DTensor
  virtual bool takes_followers() const = 0;

  // Returns the set of states of a parameter, out of the set that its group uses.
  virtual unsigned states_of(unsigned used, const TensorView& param) const = 0;
  virtual bool state_shape_matches(std::size_t operand, const TensorView& state, const TensorView& param) const = 0;

  // Completes a job: adds its layout if needed. `flat`: all operands are packed in the same order.
  virtual void locate_elements(StepWork& work, Job& job, const Views& views, bool flat) const = 0;

  // Runs all jobs and writes the scalars. Jobs on GPUs come first, so that nothing on the CPU has been written if a
  // launch fails.
  void run(StepWork& work, int threads);

 private:
  // Completes the constants of jobs on the CPU that depend on sums over DTensors. May run Python code.
  virtual void add_up_shards(StepWork& /*work*/, int /*threads*/) const {}
  virtual void run_on_cpu(const StepWork& work, int threads) = 0;  // needs no GIL
  virtual void run_on_cuda(const StepWork& work) = 0;

  const RuleInfo& info_;
};

// Returns the driver of a rule by its name. Throws std::invalid_argument if there is no such rule.
std::unique_ptr<RuleDriver> make_rule_driver(const std::string& rule);

}  // namespace onepass
