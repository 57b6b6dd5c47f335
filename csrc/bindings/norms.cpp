#include "bindings/norms.h"

#include <pybind11/stl.h>

#include <cmath>
#include <optional>
#include <string>
#include <vector>

#include "bindings/flat_tensors.h"
#include "bindings/ownership.h"
#include "bindings/torch.h"
#include "cpu/flat.h"

namespace py = pybind11;

namespace onepass {
namespace {

// Returns the tensors of all lists; nullopt if kernels cannot read one of them.
std::optional<FlatTensors> read(const std::vector<std::vector<py::object>>& lists) {
  for (const auto& list : lists)
    for (const py::object& tensor : list) {
      TensorView view;
      if (!is_plain(tensor.ptr()) || !torch().dlpack.view(tensor.ptr(), view) || is_lazy(tensor.ptr(), view.complex))
        return std::nullopt;
    }
  FlatTensors tensors;  // from here on no Python code runs
  for (const auto& list : lists) {
    tensors.open_group();
    for (const py::object& tensor : list) {
      TensorView view;
      if (!torch().dlpack.view(tensor.ptr(), view) || !view.on_cpu || !view.format) return std::nullopt;
      tensors.add(tensor.ptr(), view);
    }
  }
  return tensors;
}

// Returns the format of a flat vector that holds all tensors without loss.
Format format_of(const FlatTensors& tensors) {
  for (const Part& part : tensors.parts)
    if (part.tensor.format == Format::float64) return Format::float64;
  return Format::float32;
}

// Returns a flat vector as an operand; nullopt if it does not fit these tensors.
std::optional<Operand> operand_of(const py::object& vector, const FlatTensors& tensors) {
  TensorView view;
  const bool fits = torch().dlpack.view(vector.ptr(), view) && view.ndim == 1 && view.format == format_of(tensors) &&
                    view.shape[0] == tensors.length() && (view.shape[0] < 2 || view.strides[0] == 1);
  return fits ? std::optional(Operand{view.data, *view.format}) : std::nullopt;
}

template <class Pass>
py::list norms_by(const FlatTensors& tensors, const Pass& pass, const py::object& vector, int threads) {
  const Flat flat{tensors.ends, format_of(tensors) == Format::float64, threads};
  std::vector<PyObject*> used = tensors.used;
  used.push_back(vector.ptr());
  Found found;
  run_without_python(flat.bytes(pass.vectors()), used, [&] { found = run(flat, pass); });
  py::list norms;
  for (const double sum : found.sums) norms.append(std::sqrt(sum));
  return norms;
}

py::object norms(const std::vector<std::vector<py::object>>& lists, const py::object& origin, int threads) {
  const std::optional<FlatTensors> tensors = read(lists);
  if (!tensors) return py::none();
  std::optional<Operand> from = Operand{};
  if (!origin.is_none()) from = operand_of(origin, *tensors);
  if (!from) throw py::value_error("origin must be a flat vector that copy() has filled from tensors of these sizes");
  return norms_by(*tensors, Distance{.parts = tensors->parts, .from = *from}, origin, threads);
}

py::object copy(const std::vector<std::vector<py::object>>& lists, py::object room, int threads) {
  std::optional<FlatTensors> tensors = read(lists);
  if (!tensors) return py::none();
  std::optional<Operand> out;
  if (!room.is_none()) out = operand_of(room, *tensors);
  if (!out) {
    const py::module_ module = py::module_::import("torch");
    room = module.attr("empty")(tensors->length(), py::arg("dtype") = module.attr(name_of(format_of(*tensors))),
                                py::arg("device") = "cpu");
    tensors = read(lists);  // Python code has run
    if (!tensors) return py::none();
    out = operand_of(room, *tensors).value();
  }
  return py::make_tuple(
      room, norms_by(*tensors, Gather{.parts = tensors->parts, .out = *out, .direction = *out}, room, threads));
}

}  // namespace

void define_norms(py::module_& m) {
  m.def("norms", &norms, py::arg("lists"), py::arg("origin"), py::arg("threads"),
        "Return the Euclidean norm of each list of tensors or, if `origin` is not None, of their difference from it: a "
        "flat vector that `copy` has filled. Return None if kernels cannot read a tensor.");
  m.def(
      "copy", &copy, py::arg("lists"), py::arg("room"), py::arg("threads"),
      "Copy lists of tensors to a flat vector, `room` if it fits, and return it with the Euclidean norm of each list. "
      "Return None if kernels cannot read a tensor.");
}

}  // namespace onepass
