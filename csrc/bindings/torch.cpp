#include "bindings/torch.h"

#include <stdexcept>
#include <utility>

#include "bindings/cuda.h"
#include "bindings/dtensor.h"

namespace py = pybind11;

namespace onepass {
namespace {

Torch* the_torch = nullptr;  // never deleted, because Python is finalized before statics are destroyed

// Returns a property or method of torch.Tensor, which callers look up once instead of once per tensor.
PyObject* tensor_member(const char* name) { return py::getattr(torch().tensor_type, name).release().ptr(); }

py::object call(PyObject* method, PyObject* tensor) {
  PyObject* answer = PyObject_CallOneArg(method, tensor);
  if (answer == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(answer);
}

bool is_true(PyObject* method, PyObject* tensor) { return call(method, tensor).ptr() == Py_True; }

}  // namespace

py::object get_member(PyObject* member, PyObject* object) {
  PyObject* value = Py_TYPE(member)->tp_descr_get(member, object, reinterpret_cast<PyObject*>(Py_TYPE(object)));
  if (value == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(value);
}

void set_torch(py::object tensor_type, py::object parameter_type, py::object increment_version,
               const py::object& exchange_api, py::object workspace, py::object add_up_sums, py::object current_device,
               py::object set_device) {
  Torch given{.tensor_type = std::move(tensor_type),
              .parameter_type = std::move(parameter_type),
              .increment_version = std::move(increment_version),
              .workspace = std::move(workspace),
              .add_up_sums = std::move(add_up_sums),
              .current_device = std::move(current_device),
              .set_device = std::move(set_device),
              .dlpack = DlpackReader(exchange_api)};
  if (the_torch == nullptr) {
    the_torch = new Torch(std::move(given));
  } else {
    *the_torch = std::move(given);  // in place, because callers hold references
  }
  forget_cuda();
}

Torch& torch() { return *the_torch; }

std::byte* data_of(const py::object& tensor) {
  TensorView view;
  if (!torch().dlpack.view(tensor.ptr(), view)) throw std::runtime_error("torch does not export its own memory");
  return view.data;
}

Workspace::Workspace(std::size_t size, int device) {
  if (size == 0) return;
  tensor = torch().workspace(size, device);
  data = data_of(tensor);
}

bool is_tensor(PyObject* object) { return PyObject_IsInstance(object, torch().tensor_type.ptr()) == 1; }

bool is_plain(PyObject* tensor) {
  const auto* type = reinterpret_cast<PyObject*>(Py_TYPE(tensor));
  return type == torch().tensor_type.ptr() || type == torch().parameter_type.ptr();
}

py::object gradient_of(PyObject* param) {
  if (!is_plain(param) && !is_dtensor(param)) return py::getattr(param, "grad");
  static PyObject* const kGradMember = tensor_member("grad");
  return get_member(kGradMember, param);
}

bool is_sparse(PyObject* tensor) {
  static PyObject* const kIsSparse = tensor_member("is_sparse");
  return get_member(kIsSparse, tensor).ptr() == Py_True;
}

py::object indices_of(PyObject* sparse) {
  static PyObject* const kIndices = tensor_member("_indices");
  return call(kIndices, sparse);
}

py::object values_of(PyObject* sparse) {
  static PyObject* const kValues = tensor_member("_values");
  return call(kValues, sparse);
}

bool is_lazy(PyObject* tensor, bool complex) {
  static PyObject* const kIsNeg = tensor_member("is_neg");
  static PyObject* const kIsConj = tensor_member("is_conj");
  return is_true(kIsNeg, tensor) || (complex && is_true(kIsConj, tensor));
}

py::object resolved(const py::object& tensor) { return tensor.attr("resolve_conj")().attr("resolve_neg")(); }

py::object storage_of(PyObject* tensor) {
  static PyObject* const kStorage = tensor_member("untyped_storage");
  return call(kStorage, tensor);
}

bool has_function_mode() {
  static PyObject* const kModes =
      py::getattr(py::module_::import("torch._C"), "_len_torch_function_stack").release().ptr();
  PyObject* const modes = PyObject_CallNoArgs(kModes);
  if (modes == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::int_>(modes).cast<int>() > 0;
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

std::string shape_text(py::handle tensor) { return py::str(py::list(tensor.attr("shape"))); }

std::string type_name(PyObject* object) { return Py_TYPE(object)->tp_name; }

std::string text_of(PyObject* object, const char* name) { return py::str(py::handle(object).attr(name)); }

}  // namespace onepass
