// Adafactor's step: a plan whose states are means over rows and columns, for the second driver.
#pragma once

#include "bindings/plan.h"
#include "cpu/factored.h"

namespace onepass {

class FactoredPlan final : public Plan {
 public:
  FactoredPlan();

 private:
  std::string declines(const TensorView& param) const override;
  bool runs_on_cuda() const override;
  bool takes_shards() const override;
  unsigned states_of(unsigned used, const TensorView& param) const override;
  bool fits(std::size_t operand, const TensorView& view, const TensorView& param) const override;
  bool blends() const override;
  void place(Job& job, const std::array<TensorView, kMaxOperands>& views, bool flat) override;
  void launch(std::span<const Job> jobs, int threads) override;
  void clear() override;

  std::vector<FactoredJob> factored_;
  FactoredRoom room_;
};

}  // namespace onepass
