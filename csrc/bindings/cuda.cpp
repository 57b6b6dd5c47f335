#include "bindings/cuda.h"

#include <cstddef>
#include <cstring>
#include <map>
#include <optional>
#include <stdexcept>
#include <utility>

#include "bindings/ownership.h"
#include "bindings/torch.h"

namespace py = pybind11;

namespace onepass {
namespace {

// The module, and the answers of its devices. They do not change, and asking is slow.
struct Loaded {
  const cuda::Backend* backend = nullptr;
  std::map<int, std::string> refusals;
};

// Returns the module with the kernels; None if there is none.
py::object import_kernels() {
  try {
    return py::module_::import("onepass._cuda");
  } catch (py::error_already_set& error) {
    if (!error.matches(PyExc_ImportError)) throw;
  }
  try {
    const py::object apart = py::module_::import("onepass_cuda._cuda");  // a wheel of its own
    const auto version = apart.attr("version").cast<std::string>();
    const std::string own = ONEPASS_VERSION;
    if (version != own)
      throw py::import_error("onepass-cuda " + version + " has kernels for another onepass than " + own +
                             ": install onepass-cuda " + own);
    return apart;
  } catch (py::error_already_set& error) {
    if (!error.matches(PyExc_ImportError)) throw;
  }
  return py::none();
}

Loaded load() {
  const py::object kernels = import_kernels();
  if (kernels.is_none()) return {};
  const py::object capsule = kernels.attr("backend");
  const auto* const backend = capsule.cast<py::capsule>().get_pointer<const cuda::Backend>();
  if (backend->fingerprint != cuda::fingerprint())
    throw py::import_error(
        "the CUDA kernels are of another build than onepass._core: install onepass and onepass-cuda again");
  return {.backend = backend, .refusals = {}};
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

const cuda::Backend& backend_for(int device) {
  if (const std::string why = cuda_refusal(device); !why.empty())
    throw std::runtime_error("no kernels for cuda:" + std::to_string(device) + ": " + why);
  return *loaded().backend;
}

}  // namespace

void forget_cuda() { delete std::exchange(the_loaded, nullptr); }

std::string cuda_built() { return loaded().backend != nullptr ? loaded().backend->built : ""; }

bool is_cuda_known(int device) {
  return the_loaded != nullptr && (the_loaded->backend == nullptr || the_loaded->refusals.contains(device));
}

std::string cuda_refusal(int device) {
  const cuda::Backend* const backend = loaded().backend;
  if (backend == nullptr)
    return "no CUDA kernels are installed: compile onepass with ONEPASS_CUDA=on, or install onepass-cuda";
  if (const auto known = loaded().refusals.find(device); known != loaded().refusals.end()) return known->second;
  const OnDevice on(device);
  const char* const why = backend->unusable();
  std::string text = why != nullptr ? why : "";
  return loaded().refusals.emplace(device, std::move(text)).first->second;
}

OnDevice::OnDevice(int device) {
  const auto before = torch().current_device().cast<int>();
  if (before == device) return;
  torch().set_device(device);
  before_ = before;
}

OnDevice::~OnDevice() {  // NOLINT(bugprone-exception-escape): converting an int to Python does not throw
  if (before_ < 0) return;
  try {
    torch().set_device(before_);
  } catch (py::error_already_set& error) {
    error.discard_as_unraisable("the current device could not be restored");
  }
}

void step_on_cuda(RuleId rule, int device, std::span<const cuda::DeviceJob> jobs, const cuda::Inputs& inputs,
                  std::span<PyObject* const> used, const std::function<py::list()>& summed_shards) {
  const cuda::Backend& backend = backend_for(device);
  const std::size_t size = cuda::workspace_size(rule, jobs);
  // Python code may run here, in which other threads may free the memory of jobs. References keep it valid.
  std::optional<Owned> owned;
  if (size != 0 || torch().current_device().cast<int>() != device) owned.emplace(used);
  const Workspace workspace(size, device);
  const OnDevice on(device);
  const auto add_up_totals = [&] {
    torch().add_up_sums(summed_shards(), workspace.tensor.attr("narrow")(0, 0, cuda::totals_size(rule, jobs)));
  };
  // Launches are short, so the GIL is kept: usually there are no references.
  cuda::run_step(backend, rule, jobs, inputs, workspace.data, device, torch().dlpack.current_stream(device),
                 std::ref(add_up_totals));
}

DecidedClipping decide_on_cuda(int device, Measure what, std::span<const Job> gradients, const NormLimits& limits,
                               double grad_factor, cuda::Inputs inputs) {
  const cuda::Backend& backend = backend_for(device);
  const Workspace measures(cuda::measures_size(backend, gradients, device), device);
  Workspace result(sizeof(cuda::DeviceClipping), device);
  inputs.clipping = result.data;
  void* const stream = torch().dlpack.current_stream(device);
  const OnDevice on(device);
  {
    const py::gil_scoped_release release;
    cuda::run_measures(backend, what, gradients, limits, grad_factor, inputs, measures.data, device, stream);
  }
  return {std::move(result.tensor), result.data};
}

double norm_of(const DecidedClipping& clipping) {
  const py::object here = clipping.tensor.attr("cpu")();
  double norm = 0.0;
  std::memcpy(&norm, data_of(here) + offsetof(cuda::DeviceClipping, norm), sizeof norm);
  return norm;
}

}  // namespace onepass
