#include "bindings/cuda.h"

#include <map>
#include <stdexcept>

#include "bindings/torch.h"

namespace py = pybind11;

namespace onepass {
namespace {

struct Loaded {
  const cuda::Backend* backend = nullptr;
  std::map<int, std::string> refusals;  // by device; asking takes a moment
};

Loaded load() {
  try {
    const py::object capsule = py::module_::import("onepass._cuda").attr("backend");
    return {.backend = capsule.cast<py::capsule>().get_pointer<const cuda::Backend>(), .refusals = {}};
  } catch (py::error_already_set& error) {
    if (!error.matches(PyExc_ImportError)) throw;
    return {};
  }
}

Loaded& loaded() {
  static Loaded* const kLoaded = new Loaded(load());
  return *kLoaded;
}

}  // namespace

std::string cuda_built() { return loaded().backend != nullptr ? loaded().backend->built : ""; }

std::string cuda_refusal(int device) {
  if (loaded().backend == nullptr) return "onepass was built without CUDA kernels";
  const auto [at, is_new] = loaded().refusals.try_emplace(device);
  if (is_new)
    if (const char* why = loaded().backend->unusable(device); why != nullptr) at->second = why;
  return at->second;
}

CudaStep::CudaStep(RuleId rule, int device, std::span<const cuda::DeviceJob> jobs)
    : rule_(rule), device_(device), jobs_(jobs), stream_(torch().dlpack.current_stream(device)) {
  if (const std::string why = cuda_refusal(device); !why.empty())
    throw std::runtime_error("no kernels for cuda:" + std::to_string(device) + ": " + why);
  const std::size_t size = cuda::workspace_size(rule, jobs);
  if (size == 0) return;
  const bool pretends = torch().dlpack.pretence() != DlpackReader::Pretence::none;
  held_ = torch().workspace(size, pretends ? -1 : device);
  TensorView view;
  if (!torch().dlpack.view(held_.ptr(), view)) throw std::runtime_error("torch does not export its own memory");
  workspace_ = view.data;
}

void CudaStep::launch(const cuda::Scaler& scaler) const {
  cuda::run_step(*loaded().backend, rule_, jobs_, scaler, workspace_, device_, stream_);
}

void pretend_cuda(std::uintptr_t backend, bool numbers_too) {
  using Pretence = DlpackReader::Pretence;
  loaded() = backend != 0 ? Loaded{.backend = reinterpret_cast<const cuda::Backend*>(backend), .refusals = {}} : load();
  torch().dlpack.pretend(backend == 0 ? Pretence::none : numbers_too ? Pretence::numbers_too : Pretence::tensors);
}

}  // namespace onepass
