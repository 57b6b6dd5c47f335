#include "bindings/norms.h"

#include <pybind11/stl.h>

#include <array>
#include <cmath>
#include <list>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "bindings/flat_tensors.h"
#include "bindings/ownership.h"
#include "bindings/step_work.h"
#include "bindings/torch.h"
#include "cpu/flat.h"
#include "cpu/measure.h"
#include "cpu/scale.h"
#include "layout.h"
#include "overlap.h"

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
  const bool fits = torch().dlpack.view(vector.ptr(), view) && view.on_cpu && view.ndim == 1 &&
                    view.format == format_of(tensors) && view.shape[0] == tensors.length() &&
                    (view.shape[0] < 2 || view.strides[0] == 1);
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

// Views a gradient; returns false if kernels cannot read it.
bool view_gradient(PyObject* tensor, TensorView& view) {
  return is_plain(tensor) && torch().dlpack.view(tensor, view) && view.on_cpu && view.format;
}

Job gradient_job(const TensorView& view, std::list<Layout>& layouts) {
  return gradient_job(view, view.format == Format::float64, false, layouts);
}

py::list measure(const std::vector<py::object>& tensors, bool largest, int threads) {
  std::vector<Job> jobs;
  std::list<Layout> layouts;
  std::vector<PyObject*> used;
  std::vector<std::size_t> numbers;
  std::int64_t bytes = 0;
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    TensorView view;
    if (!view_gradient(tensors[i].ptr(), view)) continue;
    const Job& job = jobs.emplace_back(gradient_job(view, layouts));
    numbers.push_back(i);
    used.push_back(tensors[i].ptr());
    bytes += job.bytes();
  }
  std::vector<double> found;
  run_without_python(bytes, used, [&] {
    found = measure_gradients(largest ? Measure::largest_magnitude : Measure::sum_of_squares, jobs, threads);
  });
  py::list measures(tensors.size());
  for (std::size_t i = 0; i < tensors.size(); ++i) measures[i] = py::none();
  for (std::size_t j = 0; j < numbers.size(); ++j) measures[numbers[j]] = py::float_(found[j]);
  return measures;
}

bool is_writable(PyObject* tensor) {
  TensorView view;
  return view_gradient(tensor, view) && self_overlap(shape_of(view), strides_of(view)) == Overlap::none;
}

// Whether two tensors have memory in common, or are the same.
bool any_overlap(const std::vector<TensorView>& views) {
  std::vector<MemoryRange> ranges;
  std::list<Spacing> spacings;
  ranges.reserve(views.size());
  for (std::size_t i = 0; i < views.size(); ++i) ranges.push_back(memory_of(views[i], i, spacings));
  return !find_overlaps(ranges).empty();
}

std::vector<std::size_t> scale(const std::vector<py::object>& tensors, double factor, double limit, int threads) {
  std::vector<std::size_t> numbers;  // of the tensors that kernels cannot write
  py::list written;
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    if (is_writable(tensors[i].ptr())) {
      written.append(tensors[i]);
    } else {
      numbers.push_back(i);
    }
  }
  if (!numbers.empty()) return numbers;
  torch().increment_version(written);  // before the addresses are read, because it runs Python code

  // From here on no Python code runs.
  std::vector<Job> jobs;
  std::vector<TensorView> views;
  std::list<Layout> layouts;
  std::vector<PyObject*> used;
  std::int64_t bytes = 0;
  for (const py::object& tensor : tensors) {
    TensorView view;
    if (!view_gradient(tensor.ptr(), view)) throw py::value_error("scale: a tensor has changed");
    if (view.data == nullptr) continue;
    Job& job = jobs.emplace_back(gradient_job(view, layouts));
    job.grad_factor = factor;
    job.clip_value = limit;
    views.push_back(std::move(view));
    used.push_back(tensor.ptr());
    bytes += 2 * job.bytes();
  }
  if (scale_team(jobs, threads) > 1 && any_overlap(views)) threads = 1;
  run_without_python(bytes, used, [&] { scale_gradients(jobs, threads); });
  return numbers;
}

}  // namespace

void define_norms(py::module_& m) {
  m.def("measure", &measure, py::arg("tensors"), py::arg("largest"), py::arg("threads"),
        "Return the sum of squares or the largest magnitude of each tensor, None where kernels cannot read it. Complex "
        "tensors count as their real and imaginary parts.");
  m.def(
      "scale", &scale, py::arg("tensors"), py::arg("factor"), py::arg("limit"), py::arg("threads"),
      "Multiply tensors in place by `factor`, and clamp them to [-limit, limit]. A tensor that occurs twice is changed "
      "twice. Complex tensors count as their real and imaginary parts. Return the indices of the tensors that kernels "
      "cannot write; nothing is written if there are any.");
  m.def("norms", &norms, py::arg("lists"), py::arg("origin"), py::arg("threads"),
        "Return the Euclidean norm of each list of tensors or, if `origin` is not None, of their difference from it: a "
        "flat vector that `copy` has filled. Return None if kernels cannot read a tensor.");
  m.def(
      "copy", &copy, py::arg("lists"), py::arg("room"), py::arg("threads"),
      "Copy lists of tensors to a flat vector, `room` if it fits, and return it with the Euclidean norm of each list. "
      "Return None if kernels cannot read a tensor.");
}

}  // namespace onepass
