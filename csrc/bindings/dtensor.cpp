#include "bindings/dtensor.h"

#include <utility>

#include "bindings/torch.h"

namespace py = pybind11;

namespace onepass {
namespace {

struct DTensor {
  PyObject* type;
  PyObject* local;  // this and the next: descriptors of the class
  PyObject* spec;
};

// Returns torch's class, or null if its module has not been imported. Without it there are no DTensors.
const DTensor* find_dtensor() {
  static const DTensor* found = nullptr;
  if (found == nullptr) {
    const py::dict modules = py::module_::import("sys").attr("modules");
    const py::str name("torch.distributed.tensor");
    if (!modules.contains(name) || !py::hasattr(modules[name], "DTensor")) return nullptr;
    const py::object type = modules[name].attr("DTensor");
    const auto member = [&](const char* slot) { return type.attr(slot).cast<py::object>().release().ptr(); };
    found = new DTensor{type.inc_ref().ptr(), member("_local_tensor"), member("_spec")};
  }
  return found;
}

py::object spec_of(PyObject* dtensor) { return get_member(find_dtensor()->spec, dtensor); }

// Calls a function of onepass.optimizers.block_states with a parameter.
py::object call_block_states(const char* function, PyObject* param) {
  return py::module_::import("onepass.optimizers.block_states").attr(function)(py::handle(param));
}

bool same_member(const char* name, const py::object& spec, const py::object& other) {
  const py::object mine = spec.attr(name);
  const py::object others = other.attr(name);
  const int answer = PyObject_RichCompareBool(mine.ptr(), others.ptr(), Py_EQ);  // fast if they are the same object
  if (answer < 0) throw py::error_already_set();
  return answer == 1;
}

}  // namespace

bool is_dtensor(PyObject* tensor) {
  const DTensor* known = find_dtensor();
  return known != nullptr && reinterpret_cast<PyObject*>(Py_TYPE(tensor)) == known->type;
}

py::object local_of(PyObject* dtensor) { return get_member(find_dtensor()->local, dtensor); }

bool passes_for_replicated(PyObject* tensor) {
  const py::object dispatcher = py::handle(find_dtensor()->type).attr("_op_dispatcher");
  return py::handle(tensor).attr("numel")().equal(py::int_(1)) ||
         py::getattr(dispatcher, "_allow_implicit_replication", py::bool_(true)).cast<bool>();
}

void Spread::read(PyObject* dtensor) {
  py::object spec = spec_of(dtensor);
  if (spec.is(own_)) return;
  known_ = {};
  first_row_.reset();
  first_element_.reset();
  elements_.reset();
  own_ = std::move(spec);
}

Spread::Match Spread::compare(std::size_t operand, PyObject* dtensor, PyObject* param, bool& ran_python) {
  py::object spec = spec_of(dtensor);
  Compared& known = known_[operand];
  if (spec.is(own_)) return Match::same;
  if (spec.is(known.spec)) return known.match;
  ran_python = true;
  const py::object own = own_;
  const auto compared = [&] {
    if (!py::handle(dtensor).attr("shape").equal(py::handle(param).attr("shape"))) return Match::other_shape;
    if (!same_member("mesh", spec, own)) return Match::other_mesh;
    return same_member("placements", spec, own) ? Match::same : Match::other_placements;
  };
  known = {.spec = spec, .match = compared()};
  return known.match;
}

std::int64_t Spread::first_row(PyObject* param, bool& ran_python) {
  if (!first_row_) {
    ran_python = true;
    const py::object found = call_block_states("first_row", param);
    first_row_ = found.is_none() ? -1 : found.cast<std::int64_t>();
  }
  return *first_row_;
}

std::int64_t Spread::first_element(PyObject* param, bool& ran_python) {
  if (!first_element_) {
    ran_python = true;
    first_element_ = call_block_states("first_element", param).cast<std::int64_t>();
  }
  return *first_element_;
}

std::int64_t Spread::elements(PyObject* param, bool& ran_python) {
  if (!elements_) {
    ran_python = true;
    elements_ = py::handle(param).attr("numel")().cast<std::int64_t>();
  }
  return *elements_;
}

}  // namespace onepass
