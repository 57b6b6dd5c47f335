// The CUDA kernels as the bindings see them: a module that is loaded when a tensor on a GPU is first met.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <span>
#include <string>

#include "cuda/step.h"
#include "rules/registry.h"

namespace onepass {

// What the kernels were compiled with and for; empty if onepass was built without them.
std::string cuda_built();

// Why the kernels cannot step tensors on this GPU; empty if they can.
std::string cuda_refusal(int device);

// Memory for the constants that are made on the GPU, and the stream: what a step needs the GIL for. The memory is
// torch's, so it is used anew only by work that comes later on the same stream.
class CudaStep {
 public:
  CudaStep(RuleId rule, int device, std::span<const cuda::DeviceJob> jobs);

  // Puts the step on torch's current stream, without the GIL. Throws std::runtime_error.
  void launch(const cuda::Scaler& scaler) const;

 private:
  RuleId rule_;
  int device_;
  std::span<const cuda::DeviceJob> jobs_;
  pybind11::object held_;
  std::byte* workspace_ = nullptr;
  void* stream_;
};

// Tests only: takes this table of functions for the CUDA module's, and tensors on the CPU for tensors on a GPU: all of
// them, or all but the numbers that an optimizer keeps for each parameter. Null: as before.
void pretend_cuda(std::uintptr_t backend, bool numbers_too);

}  // namespace onepass
