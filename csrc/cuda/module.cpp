// onepass._cuda: the kernels, behind the table of functions that the core uses. It is loaded when a tensor on a GPU is
// first met. Importing it needs neither a GPU nor a driver.
#include <cuda_runtime_api.h>
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "cuda/backend.h"
#include "cuda/kernels.h"

namespace py = pybind11;

namespace onepass::cuda {
namespace {

const char* text_of(cudaError_t error) {
  if (error == cudaSuccess) return nullptr;
  cudaGetLastError();  // clears the error, which torch would report as its own
  return cudaGetErrorString(error);
}

const Kernels& kernels(bool wide) { return wide ? kernels_of<double>() : kernels_of<float>(); }

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

const char* launch(Work work, RuleId rule, bool wide, const LargeTable& table, void* stream) {
  const bool small = size_of(table) <= sizeof(SmallTable);
  const Pair& pair = (small ? kernels(wide).small : kernels(wide).large)[static_cast<int>(rule)];
  const bool steps = work == Work::step;
  const unsigned blocks = steps ? table.header.blocks : (table.header.rows + kThreads - 1) / kThreads;
  void* arguments[] = {const_cast<LargeTable*>(&table)};  // a small table is the beginning of a large one
  return text_of(cudaLaunchKernel(steps ? pair.step : pair.prepare, dim3(blocks), dim3(kThreads), arguments, 0,
                                  static_cast<cudaStream_t>(stream)));
}

constexpr Backend kBackend{
    .built = "CUDA " ONEPASS_CUDA_VERSION " for " ONEPASS_CUDA_DEVICES,
    .unusable = &unusable,
    .multiprocessors = &multiprocessors,
    .launch = &launch,
};

}  // namespace
}  // namespace onepass::cuda

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "The CUDA kernels of onepass.";
  m.attr("backend") = py::capsule(&onepass::cuda::kBackend, "onepass.cuda.backend");
}
