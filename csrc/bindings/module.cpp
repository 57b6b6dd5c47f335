// onepass._core: names and docstrings. The work is in the other files of this folder.
#include <omp.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bindings/apply.h"
#include "bindings/blocks.h"
#include "bindings/cuda.h"
#include "bindings/lbfgs.h"
#include "bindings/norms.h"
#include "bindings/plan.h"
#include "cpu/dispatch.h"
#include "cpu/team.h"
#include "cpu/tuning.h"

namespace py = pybind11;
using namespace onepass;

PYBIND11_MODULE(_core, m) {
  m.doc() = "The compiled core of onepass.";
  m.attr("__version__") = ONEPASS_VERSION;

  m.def("set_torch", &set_torch, py::arg("tensor_type"), py::arg("parameter_type"), py::arg("increment_version"),
        py::arg("exchange_api"), py::arg("workspace"), py::arg("add_up_sums"), py::arg("current_device"),
        py::arg("set_device"),
        "Set what the core uses of torch. A later call replaces all of it, and the CUDA kernels are imported again "
        "when they are next needed. Raises ImportError if torch has no DLPack exchange API.");
  m.def(
      "dlpack_version", [] { return torch().dlpack.version(); }, "Return the version of torch's DLPack exchange API.");

  m.def(
      "isas",
      [] {
        py::dict all;
        for (const Isa& isa : compiled_isas()) all[isa.name] = isa.supported();
        return all;
      },
      "Return the compiled instruction sets, best first, each with whether this machine supports it.");
  m.def(
      "isa", [] { return active_isa().name; },
      "Return the instruction set in use. Raises ValueError if ONEPASS_ISA is not available.");
  m.def("force_isa", &force_isa, py::arg("name"), "Use another instruction set from now on. For tests and benchmarks.");
  m.def(
      "tunings",
      [] {
        py::dict all;
        for (const Tuning& tuning : tunings()) all[tuning.name] = tuning.bytes_ahead;
        return all;
      },
      "Return the tunings, each with its prefetch distance in bytes; 0 is no prefetch.");
  m.def(
      "tuning", [] { return active_tuning().name; },
      "Return the tuning in use. Raises ValueError if ONEPASS_TUNING is unknown.");
  m.def("force_tuning", &force_tuning, py::arg("name"),
        "Use another tuning from now on; the processor's own if the name is empty. For tests and benchmarks.");
  m.def("force_bytes_per_thread", &force_bytes_per_thread, py::arg("bytes"),
        "Set how many bytes are worth another thread of a step from now on; the default if 0. For tests.");
  m.def(
      "openmp_threads", [] { return omp_get_max_threads(); },
      "Return the number of threads of the OpenMP runtime that this module uses.");

  m.def(
      "rules",
      [] {
        py::dict all;
        for (int i = 0; i < kRules; ++i) {
          const RuleInfo& info = info_of(static_cast<RuleId>(i));
          py::list hyper;
          py::list states;
          py::list scalars;
          for (const char* name : info.hyper_names) hyper.append(name);
          for (const char* name : info.state_names) states.append(name);
          for (const char* name : info.scalar_names) scalars.append(name);
          py::list codings;
          for (const Coding coding : info.state_codings) codings.append(name_of(coding));
          all[info.name] = py::make_tuple(hyper, states, scalars, info.counts_steps, codings);
        }
        return all;
      },
      "Return all rules: name -> (hyperparameters, states, scalars kept for each parameter, whether it counts steps, "
      "the coding of each state in 8 bits).");

  bind_blocks(m);

  m.def("cuda_built", &cuda_built,
        "Return the compiler and the devices of the CUDA kernels; empty if there are no kernels.");
  m.def("cuda_refusal", &cuda_refusal, py::arg("device"),
        "Return why the CUDA kernels cannot run on a GPU; empty if they can.");
  m.def(
      "cuda_device",
      [](const py::handle& tensor) {
        TensorView view;
        return torch().dlpack.view(tensor.ptr(), view) ? view.cuda : -1;
      },
      py::arg("tensor"), "Return the index of the CUDA device that a tensor is on; -1 if it is on none.");

  m.def(
      "stats",
      [] {
        py::dict all;
        all["kernel"] = stats().kernel;
        all["torch"] = stats().torch;
        return all;
      },
      "Return how many tensors have been stepped since import, by kernels and by torch's implementation.");
  m.def(
      "count",
      [](const std::map<std::string, std::uint64_t>& kernel, const std::map<std::string, std::uint64_t>& torch) {
        for (const auto& [backend, tensors] : kernel) stats().kernel[backend] += tensors;
        for (const auto& [reason, tensors] : torch) stats().torch[reason] += tensors;
      },
      py::arg("kernel"), py::arg("torch"),
      "Add to `stats`: tensors stepped by kernels for each backend, and by torch's implementation for each reason.");

  m.def(
      "apply", &apply, py::arg("rule"), py::arg("hyper"), py::arg("step"), py::arg("rows"), py::arg("grad_factor"),
      py::arg("threads"),
      "Apply an element-wise rule to rows of tensors (parameter, gradient, and the states in use), in one call. Raises "
      "ValueError for a tensor that kernels cannot read; nothing has been written then.");

  define_plan(m);
  define_lbfgs(m);
  define_norms(m);
}
