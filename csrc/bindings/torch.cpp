#include "bindings/torch.h"

#include <utility>

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

bool is_true(PyObject* method, PyObject* tensor) { return call(method, tensor).ptr() == Py_True; }

}  // namespace

void set_torch(py::object tensor_type, py::object parameter_type, py::object increment_version, py::object workspace,
               py::object exchange_device) {
  DlpackReader dlpack(tensor_type);
  the_torch = new Torch{std::move(tensor_type), std::move(parameter_type),  std::move(increment_version),
                        std::move(workspace),   std::move(exchange_device), std::move(dlpack)};
}

Torch& torch() { return *the_torch; }

bool is_plain(PyObject* tensor) {
  const auto* type = reinterpret_cast<PyObject*>(Py_TYPE(tensor));
  return type == torch().tensor_type.ptr() || type == torch().parameter_type.ptr();
}

bool is_dtensor(PyObject* tensor) {
  // Its module is imported by those who have one.
  static PyObject* type = nullptr;
  if (type == nullptr) {
    const py::dict modules = py::module_::import("sys").attr("modules");
    const py::str name("torch.distributed.tensor");
    if (!modules.contains(name) || !py::hasattr(modules[name], "DTensor")) return false;
    type = modules[name].attr("DTensor").cast<py::object>().release().ptr();
  }
  return reinterpret_cast<PyObject*>(Py_TYPE(tensor)) == type;
}

py::object local_of(PyObject* dtensor) {
  static const auto* const kLocal = new py::str("_local_tensor");
  return attribute(dtensor, *kLocal);
}

bool same_placement(PyObject* dtensor, PyObject* other) {
  static const auto* const kSpec = new py::str("_spec");
  const py::object spec = attribute(dtensor, *kSpec);
  const py::object other_spec = attribute(other, *kSpec);
  return spec.is(other_spec) || (spec.attr("placements").equal(other_spec.attr("placements")) &&
                                 spec.attr("mesh").equal(other_spec.attr("mesh")));
}

py::object gradient_of(PyObject* param) {
  if (!is_plain(param)) return py::getattr(param, "grad");
  static PyObject* const kGrad = tensor_member("grad");
  PyObject* grad = Py_TYPE(kGrad)->tp_descr_get(kGrad, param, reinterpret_cast<PyObject*>(Py_TYPE(param)));
  if (grad == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(grad);
}

bool is_sparse(PyObject* tensor) {
  static PyObject* const kIsSparse = tensor_member("is_sparse");
  PyObject* answer = Py_TYPE(kIsSparse)->tp_descr_get(kIsSparse, tensor, reinterpret_cast<PyObject*>(Py_TYPE(tensor)));
  if (answer == nullptr) throw py::error_already_set();
  Py_DECREF(answer);
  return answer == Py_True;
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
