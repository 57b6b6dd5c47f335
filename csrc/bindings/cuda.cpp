#include "bindings/cuda.h"

#include <map>
#include <stdexcept>
#include <utility>

#include "bindings/torch.h"

namespace py = pybind11;

namespace onepass {
namespace {

// The module, and the answers of its devices. They do not change, and asking is slow.
struct Loaded {
  const cuda::Backend* backend = nullptr;
  std::map<int, std::string> refusals;
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

Loaded* the_loaded = nullptr;

// Needs the GIL. An import may release it, so another thread may load the module first.
Loaded& loaded() {
  if (the_loaded == nullptr) {
    Loaded found = load();
    if (the_loaded == nullptr) the_loaded = new Loaded(std::move(found));
  }
  return *the_loaded;
}

}  // namespace

void forget_cuda() { delete std::exchange(the_loaded, nullptr); }

std::string cuda_built() { return loaded().backend != nullptr ? loaded().backend->built : ""; }

std::string cuda_refusal(int device) {
  const cuda::Backend* const backend = loaded().backend;
  if (backend == nullptr) return "onepass was built without CUDA kernels";
  if (const auto known = loaded().refusals.find(device); known != loaded().refusals.end()) return known->second;
  const OnDevice on(device);
  const char* const why = backend->unusable();
  return loaded().refusals[device] = why != nullptr ? why : "";
}

OnDevice::OnDevice(int device) : before_(torch().exchange_device(device).cast<int>()) {}

OnDevice::~OnDevice() {  // NOLINT(bugprone-exception-escape): converting an int to Python does not throw
  if (before_ < 0) return;
  try {
    torch().exchange_device(before_);
  } catch (py::error_already_set& error) {
    error.discard_as_unraisable("the current device could not be restored");
  }
}

void step_on_cuda(RuleId rule, int device, std::span<const cuda::DeviceJob> jobs, const cuda::Scaler& scaler) {
  if (const std::string why = cuda_refusal(device); !why.empty())
    throw std::runtime_error("no kernels for cuda:" + std::to_string(device) + ": " + why);
  // Memory for the constants that are made on the GPU. It belongs to torch's allocator, which gives it only to later
  // work on the same stream.
  py::object held;
  std::byte* workspace = nullptr;
  if (const std::size_t size = cuda::workspace_size(rule, jobs); size != 0) {
    held = torch().workspace(size, device);
    TensorView view;
    if (!torch().dlpack.view(held.ptr(), view)) throw std::runtime_error("torch does not export its own memory");
    workspace = view.data;
  }
  void* const stream = torch().dlpack.current_stream(device);
  const cuda::Backend& backend = *loaded().backend;
  const OnDevice on(device);
  const py::gil_scoped_release release;
  cuda::run_step(backend, rule, jobs, scaler, workspace, device, stream);
}

}  // namespace onepass
