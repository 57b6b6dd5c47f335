#include "bindings/lbfgs.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <list>
#include <stdexcept>

#include "bindings/apply.h"
#include "bindings/ownership.h"
#include "bindings/param_reader.h"
#include "layout.h"
#include "overlap.h"
#include "rules/math.h"

namespace py = pybind11;

namespace onepass {
namespace {

// A pair of less curvature is not added to the history, as in torch.
constexpr double kLeastCurvature = 1e-10;

// Calls visit(group, index, param) for all parameters in order.
template <class Visit>
void for_each_param(const py::list& groups, Visit&& visit) {
  for (std::size_t g = 0; g < groups.size(); ++g) {
    const auto params = groups[g].cast<py::list>();
    for (std::size_t i = 0; i < params.size(); ++i) visit(g, i, params[i].ptr());
  }
}

std::string named(std::size_t group, std::size_t index) {
  return "LBFGS: parameter " + std::to_string(index) + " of group " + std::to_string(group);
}

// Returns why kernels cannot step a parameter; empty if they can.
std::string why_torch(PyObject* param, TensorView& view) {
  if (!is_plain(param)) return "tensor subclass " + type_name(param);
  if (!torch().dlpack.view(param, view)) {
    return py::handle(param).attr("is_meta").cast<bool>() ? "device meta" : "no strided memory";
  }
  if (!view.on_cpu) return "device " + py::str(py::handle(param).attr("device").attr("type")).cast<std::string>();
  if (!view.format) return "dtype " + text_of(param, "dtype");
  if (is_lazy(param, view.complex)) return "negated or conjugated parameter";
  if (self_overlap(shape_of(view), strides_of(view)) != Overlap::none) return "parameter that overlaps itself";
  return {};
}

// Returns the gradient as a tensor that kernels can read.
py::object readable_gradient(PyObject* param, py::object grad) {
  const auto reads = [&] {
    TensorView view;
    return is_plain(grad.ptr()) && torch().dlpack.view(grad.ptr(), view) && view.on_cpu && view.format &&
           !is_lazy(grad.ptr(), view.complex);
  };
  if (reads()) return grad;
  grad = grad.attr("detach")();
  if (!py::handle(grad.attr("layout")).is(py::module_::import("torch").attr("strided"))) grad = grad.attr("to_dense")();
  if (reads()) return grad;
  py::object copy = py::handle(param).attr("detach")().attr("clone")();
  copy.attr("copy_")(grad);
  grad = std::move(copy);
  if (!reads()) throw std::logic_error("kernels cannot read a copy of a parameter that they can read");
  return grad;
}

// Returns torch's reference count of a storage; -1 if this torch does not have it.
std::int64_t users_of(const py::object& storage) {
  const py::object count = py::getattr(py::module_::import("torch._C"), "_storage_Use_Count", py::none());
  return count.is_none() ? -1 : count(storage.attr("_cdata")).cast<std::int64_t>();
}

std::vector<PyObject*> pointers_to(const auto&... lists) {
  std::vector<PyObject*> pointers;
  const auto add = [&](const std::vector<py::object>& list) {
    for (const py::object& object : list) pointers.push_back(object.ptr());
  };
  (add(lists), ...);
  return pointers;
}

// Whether a tensor is known not to have been changed since it had a version. Inference tensors have none.
bool is_unchanged(const py::object& tensor, std::int64_t version) {
  return version >= 0 && version_of(tensor.ptr()) == version;
}

}  // namespace

// -- reading tensors -------------------------------------------------------------------------------------------------

Lbfgs::Readable Lbfgs::prepare(const py::list& groups, bool gradients) {
  Readable readable;
  readable.groups = groups.size();
  for_each_param(groups, [&](std::size_t g, std::size_t i, PyObject* param) {
    readable.params.push_back(py::reinterpret_borrow<py::object>(param));
    readable.places.emplace_back(g, i);
  });
  for (std::size_t k = 0; k < readable.params.size(); ++k) {
    const auto [g, i] = readable.places[k];
    PyObject* const param = readable.params[k].ptr();
    TensorView own;
    if (const std::string why = why_torch(param, own); !why.empty())
      throw py::value_error(named(g, i) + " was changed during the step, and kernels cannot read it: " + why);
    if (!gradients) {
      readable.tensors.push_back(readable.params[k]);
      continue;
    }
    py::object grad = gradient_of(param);
    if (!grad.is_none()) grad = readable_gradient(param, std::move(grad));
    readable.tensors.push_back(std::move(grad));
  }
  return readable;
}

FlatTensors Lbfgs::locate(const Readable& readable) {
  FlatTensors tensors;
  for (std::size_t k = 0; k < readable.params.size(); ++k) {
    const auto [g, i] = readable.places[k];
    while (tensors.ends.size() <= g) tensors.open_group();
    const py::object& tensor = readable.tensors[k];
    TensorView own = require_view(readable.params[k].ptr(), named(g, i));
    if (tensor.is_none()) {
      own.data = nullptr;
      tensors.add(nullptr, own);
      continue;
    }
    const TensorView view = require_view(tensor.ptr(), named(g, i) + ": its gradient");
    if (!same_shape(view, own))
      throw py::value_error(named(g, i) + ": its gradient has shape " +
                            std::string(py::str(py::list(tensor.attr("shape")))));
    tensors.add(tensor.ptr(), view);
  }
  while (tensors.ends.size() < readable.groups) tensors.open_group();
  return tensors;
}

std::vector<Format> Lbfgs::formats_of(const FlatTensors& tensors) {
  std::vector<Format> formats;
  formats.reserve(tensors.parts.size());
  for (const Part& part : tensors.parts) formats.push_back(part.tensor.format);
  return formats;
}

FlatTensors Lbfgs::locate_again(const Readable& readable, bool gradients) const {
  FlatTensors tensors = locate(readable);
  if (tensors.ends != flat_.ends) throw py::value_error("LBFGS: the parameters' sizes have changed within the step");
  if (!gradients && formats_of(tensors) != formats_)  // in which their values have been kept
    throw py::value_error("LBFGS: the parameters' dtypes have changed within the step");
  return tensors;
}

void Lbfgs::check_vectors(const Objects& vectors, const std::string& what) {
  for (const py::object& vector : vectors) require_plain(vector.ptr(), "LBFGS: its state " + what);
}

template <class Pass>
Found Lbfgs::run_pass(const Pass& pass, std::vector<PyObject*> used) const {
  Found found;
  run_without_python(flat_.bytes(pass.vectors()), used, [&] { found = run(flat_, pass); });
  return found;
}

py::list Lbfgs::refusals(const py::list& groups) const {
  py::list refused;
  std::vector<std::pair<std::size_t, std::size_t>> places;
  std::vector<MemoryRange> ranges;
  std::list<Spacing> spacings;
  for_each_param(groups, [&](std::size_t g, std::size_t i, PyObject* param) {
    TensorView view;
    if (const std::string why = why_torch(param, view); !why.empty()) {
      refused.append(py::make_tuple(g, i, why));
      return;
    }
    ranges.push_back(memory_of(view, places.size(), spacings));
    places.emplace_back(g, i);
  });
  for (const MemoryOverlap& overlap : find_overlaps(ranges)) {
    const auto [g, i] = places[overlap.later];
    refused.append(py::make_tuple(g, i, "memory shared with another parameter"));
  }
  return refused;
}

void Lbfgs::begin(const py::list& groups, std::vector<double> weights, int threads) {
  const Readable readable_params = prepare(groups, false);
  const Readable readable_gradients = prepare(groups, true);
  const FlatTensors params = locate(readable_params);
  const FlatTensors gradients = locate(readable_gradients);
  if (params.ends != flat_.ends) {
    history_ = {};
    held_.clear();
  }
  // The format that all of them can be converted to without loss.
  Format format = params.parts.empty() ? Format::float32 : params.parts.front().tensor.format;
  for (const FlatTensors* tensors : {&params, &gradients})
    for (const Part& part : tensors->parts)
      if (part.tensor.format != format)
        format = size_of(part.tensor.format) == 8 || size_of(format) == 8 ? Format::float64 : Format::float32;
  if (params.ends != flat_.ends || format != format_) buffers_.clear();
  flat_ = {params.ends, format == Format::float64, threads};
  format_ = format;
  formats_ = formats_of(params);
  weights_ = std::move(weights);
  found_ = {};
}

bool Lbfgs::Buffer::is_free() const { return Py_REFCNT(tensor.ptr()) == 1 && users_of(storage) == users; }

py::object Lbfgs::buffer() {
  for (const Buffer& buffer : buffers_)
    if (buffer.is_free()) return buffer.tensor;
  const py::module_ module = py::module_::import("torch");
  py::object tensor =
      module.attr("empty")(length(), py::arg("dtype") = module.attr(name_of(format_)), py::arg("device") = "cpu");
  py::object storage = tensor.attr("untyped_storage")();
  const std::int64_t users = users_of(storage);
  if (users >= 0) buffers_.push_back({tensor, std::move(storage), users});
  return tensor;
}

// Returns a flat vector of the state as an operand: of any dtype, and as long as all parameters together.
Operand Lbfgs::vector(const py::handle& tensor, const std::string& what) const {
  const TensorView view = require_view(tensor.ptr(), "LBFGS: its state " + what);
  if (elements_of(view) != length() || view.ndim != 1 || (length() > 1 && view.strides[0] != 1))
    throw py::value_error("LBFGS: its state " + what + " has shape " +
                          std::string(py::str(py::list(tensor.attr("shape")))) + ", but there are " +
                          std::to_string(length()) + " parameters");
  return {view.data, *view.format};
}

// -- the passes ------------------------------------------------------------------------------------------------------

std::pair<std::vector<double>, double> Lbfgs::gather(const py::list& groups, bool gradients, const py::object& out,
                                                     const py::object& direction) {
  const Readable readable = prepare(groups, gradients);
  check_vectors({out}, "out");
  if (!direction.is_none()) check_vectors({direction}, "d");
  FlatTensors tensors = locate_again(readable, gradients);
  Gather pass{.parts = tensors.parts, .out = vector(out, "out"), .direction = {}};
  if (!direction.is_none()) pass.direction = vector(direction, "d");
  tensors.used.insert(tensors.used.end(), {out.ptr(), direction.ptr()});
  const Found found = run_pass(pass, tensors.used);
  double slope = 0.0;
  for (const double sum : found.sums) slope += sum;
  return {found.largest, slope};
}

void Lbfgs::move(const py::list& groups, const py::object& x, const py::object& direction, double step, bool keep) {
  const Readable readable = prepare(groups, false);
  check_vectors({x}, "x");
  check_vectors({direction}, "d");
  const py::object written = py::cast(readable.params);  // before anything is written, and before addresses are read
  FlatTensors tensors = locate_again(readable, false);
  const Move pass{
      .parts = tensors.parts, .x = vector(x, "x"), .direction = vector(direction, "d"), .step = step, .keep = keep};
  tensors.used.insert(tensors.used.end(), {x.ptr(), direction.ptr()});
  run_pass(pass, tensors.used);
  torch().increment_version(written);
}

// -- the history -----------------------------------------------------------------------------------------------------

std::vector<Pair> Lbfgs::pairs(const Objects& all_y, const Objects& all_s) const {
  if (all_y.size() != all_s.size())
    throw py::value_error("LBFGS: its states old_dirs and old_stps differ in length: " + std::to_string(all_y.size()) +
                          " and " + std::to_string(all_s.size()));
  std::vector<Pair> pairs;
  pairs.reserve(all_y.size());
  for (std::size_t k = 0; k < all_y.size(); ++k)
    pairs.push_back({.s = vector(all_s[k], "old_stps"), .y = vector(all_y[k], "old_dirs")});
  return pairs;
}

// Whether the history has the products of these pairs.
bool Lbfgs::knows(const Objects& all_y, const Objects& all_s) const {
  if (held_.size() != all_y.size() || held_.size() != all_s.size()) return false;
  for (std::size_t k = 0; k < held_.size(); ++k) {
    const HeldPair& held = held_[k];
    if (!held.y.is(all_y[k]) || !held.s.is(all_s[k]) || !is_unchanged(held.y, held.y_version) ||
        !is_unchanged(held.s, held.s_version))
      return false;
  }
  return true;
}

void Lbfgs::hold(const py::object& y, const py::object& s) {
  held_.push_back({y, s, version_of(y.ptr()), version_of(s.ptr())});
}

// Computes the products of a history that this object has not made: from a checkpoint, or another optimizer.
void Lbfgs::learn(const Objects& all_y, const Objects& all_s) {
  history_ = {};
  held_.clear();
  for (std::size_t k = 0; k < all_y.size(); ++k) {
    const std::vector<Pair> all = pairs(all_y, all_s);
    const Products pass{.pairs = {all.data(), k + 1}, .gradient = all[k].y, .previous = {}, .direction = {}};
    history_.push(run_pass(pass, pointers_to(all_y, all_s)));
    hold(all_y[k], all_s[k]);
  }
}

py::object Lbfgs::update(py::list list_y, py::list list_s, const py::object& gradient, const py::object& previous,
                         const py::object& direction, double step, std::size_t size) {
  auto all_y = list_y.cast<Objects>();
  auto all_s = list_s.cast<Objects>();
  const py::object y = buffer();
  const py::object s = buffer();
  check_vectors(all_y, "old_dirs");
  check_vectors(all_s, "old_stps");
  check_vectors({gradient}, "gradient");
  check_vectors({previous}, "prev_flat_grad");
  check_vectors({direction}, "d");
  if (!knows(all_y, all_s)) learn(all_y, all_s);
  all_y.push_back(y);
  all_s.push_back(s);
  const std::vector<Pair> all = pairs(all_y, all_s);
  const Products pass{.pairs = all,
                      .gradient = vector(gradient, "gradient"),
                      .previous = vector(previous, "prev_flat_grad"),
                      .direction = vector(direction, "d"),
                      .step = step};
  found_ = run_pass(pass, pointers_to(all_y, all_s, Objects{gradient, previous, direction}));
  first_ = 0;
  const std::size_t newest = all.size() - 1;
  const double sy = weighted(found_, newest, Products::sy, weights_);
  const double yy = weighted(found_, newest, Products::yy, weights_);
  if (!(sy > kLeastCurvature) || size == 0) return py::none();
  list_y.append(y);
  try {
    list_s.append(s);
  } catch (...) {  // lists that differ in length would be an error from now on
    list_y.attr("pop")();
    throw;
  }
  history_.push(found_);  // if the rest fails, the next call learns the products again
  hold(y, s);
  for (; history_.size() > size; ++first_) {
    history_.drop_oldest();
    held_.erase(held_.begin());
    list_y.attr("pop")(0);
    list_s.attr("pop")(0);
  }
  return py::make_tuple(1.0 / sy, sy / yy);
}

Lbfgs::Direction Lbfgs::direction(const py::list& list_y, const py::list& list_s, const py::object& gradient,
                                  const py::object& out) {
  const auto all_y = list_y.cast<Objects>();
  const auto all_s = list_s.cast<Objects>();
  check_vectors(all_y, "old_dirs");
  check_vectors(all_s, "old_stps");
  check_vectors({gradient}, "gradient");
  check_vectors({out}, "d");
  const std::vector<Pair> all = pairs(all_y, all_s);
  if (all.empty()) history_ = {}, held_.clear();
  if (all.size() != history_.size())
    throw std::logic_error("direction() needs an update() of the same history before it");
  const History::Direction wanted = history_.direction(found_, first_, weights_);
  const Combine pass{
      .pairs = all, .factors = wanted.factors, .gradient = vector(gradient, "gradient"), .out = vector(out, "d")};
  const Found found = run_pass(pass, pointers_to(all_y, all_s, Objects{gradient, out}));
  Direction direction{.slope = 0.0, .norm = 0.0, .largest = 0.0, .alpha = wanted.alpha};
  for (std::size_t group = 0; group < weights_.size(); ++group) {
    direction.slope += found.sum(group, 0);
    direction.norm += found.sum(group, 1);
    direction.largest = maximum(direction.largest, found.largest[group]);
  }
  return direction;
}

void define_lbfgs(py::module_& m) {
  py::class_<Lbfgs>(m, "Lbfgs", "L-BFGS's operations on flat vectors: see bindings/lbfgs.h.")
      .def(py::init<>())
      .def(
          "__enter__", [](Lbfgs& self) { self.mutex().lock(); }, "Wait until no other thread makes a step.")
      .def("__exit__", [](Lbfgs& self, const py::args&) { self.mutex().unlock(); })
      .def_property_readonly("length", &Lbfgs::length)
      .def("refusals", &Lbfgs::refusals, py::arg("groups"),
           "Return (group, index, reason) of the parameters that the kernels cannot step.")
      .def("begin", &Lbfgs::begin, py::arg("groups"), py::arg("weights"), py::arg("threads"),
           "Begin a step on lists of parameters, each list with its weight.")
      .def("buffer", &Lbfgs::buffer, "Return a flat vector to which there is no other reference.")
      .def("gather", &Lbfgs::gather, py::arg("groups"), py::arg("gradients"), py::arg("out"), py::arg("direction"),
           "Copy gradients or parameters to a flat vector. Return the largest magnitude of each group, and the product "
           "with the direction.")
      .def("move", &Lbfgs::move, py::arg("groups"), py::arg("x"), py::arg("direction"), py::arg("step"),
           py::arg("keep"), "Set parameters = x + step * direction. With keep, first set x = parameters.")
      .def("update", &Lbfgs::update, py::arg("all_y"), py::arg("all_s"), py::arg("gradient"), py::arg("previous"),
           py::arg("direction"), py::arg("step"), py::arg("size"),
           "Add the newest pair to the history. Return 1 / s.y and s.y / y.Dy, or None if it was not added.")
      .def(
          "direction",
          [](Lbfgs& self, const py::list& all_y, const py::list& all_s, const py::object& gradient,
             const py::object& out) {
            const Lbfgs::Direction found = self.direction(all_y, all_s, gradient, out);
            return py::make_tuple(found.slope, found.norm, found.largest, found.alpha);
          },
          py::arg("all_y"), py::arg("all_s"), py::arg("gradient"), py::arg("out"),
          "Set out = -H gradient. Return gradient . out, the sum and the maximum of |out|, and the recursion's "
          "alphas.");
}

}  // namespace onepass
