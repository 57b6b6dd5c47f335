#include "bindings/torch.h"

#include <utility>

#include "bindings/cuda.h"

namespace py = pybind11;

namespace onepass {
namespace {

Torch* the_torch = nullptr;  // never deleted: when statics are destroyed, Python is gone

// A property or method of torch.Tensor, looked up once instead of once per tensor.
PyObject* tensor_member(const char* name) { return py::getattr(torch().tensor_type, name).release().ptr(); }

py::object call(PyObject* method, PyObject* tensor) {
  PyObject* answer = PyObject_CallOneArg(method, tensor);
  if (answer == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(answer);
}

// What a property, or a slot, of a class says of an object; it saves the search for it by its name.
py::object get(PyObject* member, PyObject* object) {
  PyObject* value = Py_TYPE(member)->tp_descr_get(member, object, reinterpret_cast<PyObject*>(Py_TYPE(object)));
  if (value == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(value);
}

struct DTensor {
  PyObject* type;
  PyObject* local;  // the slots
  PyObject* spec;
};

// torch's class, whose module is imported by those who have one; null until then.
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

bool is_true(PyObject* method, PyObject* tensor) { return call(method, tensor).ptr() == Py_True; }

}  // namespace

void set_torch(py::object tensor_type, py::object parameter_type, py::object increment_version,
               const py::object& exchange_api, py::object workspace, py::object exchange_device) {
  Torch given{.tensor_type = std::move(tensor_type),
              .parameter_type = std::move(parameter_type),
              .increment_version = std::move(increment_version),
              .workspace = std::move(workspace),
              .exchange_device = std::move(exchange_device),
              .dlpack = DlpackReader(exchange_api)};
  if (the_torch == nullptr) {
    the_torch = new Torch(std::move(given));
  } else {
    *the_torch = std::move(given);  // in place, for those who hold a reference
  }
  forget_cuda();
}

Torch& torch() { return *the_torch; }

bool is_plain(PyObject* tensor) {
  const auto* type = reinterpret_cast<PyObject*>(Py_TYPE(tensor));
  return type == torch().tensor_type.ptr() || type == torch().parameter_type.ptr();
}

bool is_dtensor(PyObject* tensor) {
  const DTensor* known = find_dtensor();
  return known != nullptr && reinterpret_cast<PyObject*>(Py_TYPE(tensor)) == known->type;
}

py::object local_of(PyObject* dtensor) { return get(find_dtensor()->local, dtensor); }

py::object spec_of(PyObject* dtensor) { return get(find_dtensor()->spec, dtensor); }

namespace {

bool same_member(const char* name, const py::object& spec, const py::object& other) {
  const py::object mine = spec.attr(name);
  const py::object others = other.attr(name);
  const int answer = PyObject_RichCompareBool(mine.ptr(), others.ptr(), Py_EQ);  // true at once if they are one object
  if (answer < 0) throw py::error_already_set();
  return answer == 1;
}

}  // namespace

bool same_mesh(const py::object& spec, const py::object& other) { return same_member("mesh", spec, other); }

bool same_placements(const py::object& spec, const py::object& other) { return same_member("placements", spec, other); }

bool passes_for_replicated(PyObject* tensor) {
  const py::object dispatcher = py::handle(find_dtensor()->type).attr("_op_dispatcher");
  return py::handle(tensor).attr("numel")().equal(py::int_(1)) ||
         py::getattr(dispatcher, "_allow_implicit_replication", py::bool_(true)).cast<bool>();
}

py::object gradient_of(PyObject* param) {
  if (!is_plain(param) && !is_dtensor(param)) return py::getattr(param, "grad");
  static PyObject* const kGradient = tensor_member("grad");
  return get(kGradient, param);
}

bool is_sparse(PyObject* tensor) {
  static PyObject* const kIsSparse = tensor_member("is_sparse");
  return get(kIsSparse, tensor).ptr() == Py_True;
}

py::object indices_of(PyObject* sparse) {
  static PyObject* const kIndices = tensor_member("_indices");
  return call(kIndices, sparse);
}

py::object values_of(PyObject* sparse) {
  static PyObject* const kValues = tensor_member("_values");
  return call(kValues, sparse);
}

bool is_lazy(PyObject* tensor, const TensorView& view) {
  static PyObject* const kIsNeg = tensor_member("is_neg");
  static PyObject* const kIsConj = tensor_member("is_conj");
  return is_true(kIsNeg, tensor) || (view.complex && is_true(kIsConj, tensor));
}

py::object attribute(PyObject* object, const py::str& name) {
  PyObject* value = PyObject_GetAttr(object, name.ptr());
  if (value == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(value);
}

PyObject* lookup(PyObject* dict, const py::handle& key) {
  PyObject* value = PyDict_GetItemWithError(dict, key.ptr());
  if (value == nullptr && PyErr_Occurred() != nullptr) throw py::error_already_set();
  return value;
}

std::string type_name(PyObject* object) { return Py_TYPE(object)->tp_name; }

std::string text_of(PyObject* object, const char* name) { return py::str(py::handle(object).attr(name)); }

}  // namespace onepass
