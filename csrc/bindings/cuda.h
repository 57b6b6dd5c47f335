// The module with the CUDA kernels, which is loaded when a tensor on a GPU is first met.
#pragma once

#include <pybind11/pybind11.h>

#include <functional>
#include <span>
#include <string>

#include "cuda/step.h"
#include "rules/registry.h"

namespace onepass {

// Returns the compiler and the devices of the kernels; empty if onepass was built without them.
std::string cuda_built();

// Forgets the module. It is imported again when it is next needed.
void forget_cuda();

// Returns why the kernels cannot step tensors on this GPU; empty if they can. Python code runs at the first question.
std::string cuda_refusal(int device);
bool is_cuda_known(int device);  // whether it has been asked

// Makes a device the current one, for torch and the CUDA runtime, during its lifetime. Needs the GIL.
class OnDevice {
 public:
  explicit OnDevice(int device);
  ~OnDevice();
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

 private:
  int before_ = -1;  // the previous device; -1: unchanged
};

// Steps all jobs, on torch's current stream of the device. `used`: the objects whose memory they use. `summed_shards`
// returns the DTensors with sums over shards, in the order of their jobs. It is called only if there are any, because a
// list must not be made while no references are held. Throws std::runtime_error if the kernels cannot run there or a
// launch fails.
void step_on_cuda(RuleId rule, int device, std::span<const cuda::DeviceJob> jobs, const cuda::Inputs& inputs,
                  std::span<PyObject* const> used, const std::function<pybind11::list()>& summed_shards);

// A cuda::DeviceClipping: a tensor of 24 bytes on the GPU, and its memory.
struct DecidedClipping {
  pybind11::object tensor;
  const std::byte* data = nullptr;
};

// Measures gradients, and decides how the step depends on their norm, likewise. Does not wait for the result. Python
// code may run: the caller holds references to the gradients' memory.
DecidedClipping decide_on_cuda(int device, Measure what, std::span<const Job> gradients, const NormLimits& limits,
                               double grad_factor, cuda::Inputs inputs);

// Waits for the result, and returns the norm.
double norm_of(const DecidedClipping& clipping);

}  // namespace onepass
