// onepass._cuda, or onepass_cuda._cuda if it is installed apart: the kernels, behind the table of functions that the
// core uses. It is loaded when a tensor on a GPU is first met. Importing it needs neither a GPU nor a driver. It uses
// Python's stable ABI only, so one binary is for all Pythons but free-threaded ones.
#include <Python.h>
#include <cuda_runtime_api.h>

#include <stdexcept>
#include <string>

#include "cuda/backend.h"
#include "cuda/kernels.h"

namespace onepass::cuda {
namespace {

const char* text_of(cudaError_t error) {
  if (error == cudaSuccess) return nullptr;
  cudaGetLastError();  // clears the error, which torch would report as its own
  return cudaGetErrorString(error);
}

const Kernels& kernels(bool wide) { return wide ? kernels_of<double>() : kernels_of<float>(); }
SumKernels sum_kernels(RuleId rule, bool wide) {
  return wide ? sum_kernels_of<double>(rule) : sum_kernels_of<float>(rule);
}

// Returns why the kernels can never run on the current device. Throws for errors that may pass, such as lack of memory.
const char* unusable() {
  cudaFuncAttributes attributes;
  const cudaError_t error =
      cudaFuncGetAttributes(&attributes, kernels(false).large[static_cast<int>(RuleId::adam)].step);
  const char* const text = text_of(error);
  switch (error) {
    case cudaSuccess:
    case cudaErrorNoKernelImageForDevice:
    case cudaErrorInvalidDeviceFunction:
    case cudaErrorUnsupportedPtxVersion:
    case cudaErrorInsufficientDriver:
      return text;
    default:
      throw std::runtime_error(std::string("the CUDA kernels cannot be loaded: ") + text);
  }
}

int multiprocessors(int device) {
  int count = 0;
  if (cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device) != cudaSuccess) cudaGetLastError();
  return count > 0 ? count : 1;
}

const void* kernel_of(Work work, RuleId rule, bool wide, bool small) {
  const auto& measures = small ? norm_kernels().small : norm_kernels().large;
  const Pair& pair = (small ? kernels(wide).small : kernels(wide).large)[static_cast<int>(rule)];
  switch (work) {
    case Work::prepare:
      return pair.prepare;
    case Work::step:
      return pair.step;
    case Work::step_stochastic:
      return stochastic_kernel_of(rule);
    case Work::sum:
      return sum_kernels(rule, wide).sum;
    case Work::total:
      return sum_kernels(rule, wide).total;
    case Work::complete:
      return sum_kernels(rule, wide).complete;
    case Work::sum_of_squares:
      return measures[static_cast<int>(Measure::sum_of_squares)][wide ? 1 : 0];
    case Work::largest_magnitude:
      return measures[static_cast<int>(Measure::largest_magnitude)][wide ? 1 : 0];
  }
  return nullptr;
}

const char* launch_kernel(const void* kernel, unsigned blocks, const void* argument, void* stream) {
  void* arguments[] = {const_cast<void*>(argument)};
  return text_of(
      cudaLaunchKernel(kernel, dim3(blocks), dim3(kThreads), arguments, 0, static_cast<cudaStream_t>(stream)));
}

const char* launch(Work work, RuleId rule, bool wide, const LargeTable& table, void* stream) {
  // A small table is the beginning of a large one.
  const bool has_small =
      work == Work::prepare || work == Work::step || work == Work::sum_of_squares || work == Work::largest_magnitude;
  const bool small = has_small && size_of(table) <= sizeof(SmallTable);
  return launch_kernel(kernel_of(work, rule, wide, small), blocks_of(work, table), &table, stream);
}

const char* decide(const Decision& decision, void* stream) {
  return launch_kernel(norm_kernels().decide, 1, &decision, stream);
}

constexpr Backend kBackend{
    .fingerprint = fingerprint(),
    .built = "CUDA " ONEPASS_CUDA_VERSION " for " ONEPASS_CUDA_DEVICES,
    .unusable = &unusable,
    .multiprocessors = &multiprocessors,
    .launch = &launch,
    .decide = &decide,
};

}  // namespace
}  // namespace onepass::cuda

// NOLINTNEXTLINE(bugprone-reserved-identifier): the name that Python looks for
PyMODINIT_FUNC PyInit__cuda() {
  static PyModuleDef definition{
      PyModuleDef_HEAD_INIT, "_cuda", "The CUDA kernels of onepass.", -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  PyObject* const module = PyModule_Create(&definition);
  if (module == nullptr) return nullptr;
  auto* const table = const_cast<onepass::cuda::Backend*>(&onepass::cuda::kBackend);
  PyObject* const capsule = PyCapsule_New(table, "onepass.cuda.backend", nullptr);
  const bool added = capsule != nullptr && PyModule_AddObjectRef(module, "backend", capsule) == 0 &&
                     PyModule_AddStringConstant(module, "version", ONEPASS_VERSION) == 0;
  Py_XDECREF(capsule);
  if (added) return module;
  Py_DECREF(module);
  return nullptr;
}
