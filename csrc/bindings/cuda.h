// The CUDA kernels as the bindings see them: a module that is loaded when a tensor on a GPU is first met.
#pragma once

#include <pybind11/pybind11.h>

#include <span>
#include <string>

#include "cuda/step.h"
#include "rules/registry.h"

namespace onepass {

// What the kernels were compiled with and for; empty if onepass was built without them.
std::string cuda_built();

// Forgets the module, which is imported again when it is next needed.
void forget_cuda();

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

}  // namespace onepass
