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

// Makes a device the current one, as torch and the CUDA runtime know it, as long as it lives. Needs the GIL.
class OnDevice {
 public:
  explicit OnDevice(int device);
  ~OnDevice();
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

 private:
  int before_;
};

// Steps all jobs, on torch's current stream of the device. Throws std::runtime_error.
void step_on_cuda(RuleId rule, int device, std::span<const cuda::DeviceJob> jobs, const cuda::Scaler& scaler);

// Tests only: takes this table of functions for the CUDA module's, and tensors on the CPU for tensors on a GPU: all of
// them, or all but the numbers that an optimizer keeps for each parameter. Null: as before.
void pretend_cuda(std::uintptr_t backend, bool numbers_too);

}  // namespace onepass
