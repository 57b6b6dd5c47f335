// What the bindings use of torch, without its headers: Python objects, and DLPack for tensors' memory.
#pragma once

#include <pybind11/pybind11.h>

#include <string>

#include "bindings/dlpack.h"

namespace onepass {

struct Torch {
  pybind11::object tensor_type;
  pybind11::object parameter_type;
  pybind11::object increment_version;
  pybind11::object workspace;        // (bytes, GPU or -1) -> a tensor of so many bytes
  pybind11::object exchange_device;  // GPU -> what was the current one, and now is not, or -1 if nothing changes
  DlpackReader dlpack;
};

// Handed over by the Python layer. A later call replaces all of it, the CUDA kernels' module included; only the two
// types have to stay the same.
void set_torch(pybind11::object tensor_type, pybind11::object parameter_type, pybind11::object increment_version,
               const pybind11::object& exchange_api, pybind11::object workspace, pybind11::object exchange_device);
Torch& torch();

// Whether it is a torch.Tensor or Parameter itself, not of a subclass.
bool is_plain(PyObject* tensor);

// Whether it is a torch.Tensor, or of a subclass.
bool is_tensor(PyObject* object);

// param.grad, which may be None.
pybind11::object gradient_of(PyObject* param);

bool is_sparse(PyObject* tensor);

// Indices and values of a sparse tensor, as it holds them.
pybind11::object indices_of(PyObject* sparse);
pybind11::object values_of(PyObject* sparse);

// Whether the tensor's values are not those in its memory: torch negates or, if it is complex, conjugates lazily, and
// exports say nothing of it. torch lets go of the GIL in this call.
bool is_lazy(PyObject* tensor, bool complex);

// The tensor with its values in memory.
pybind11::object resolved(const pybind11::object& tensor);

// The object that owns a tensor's memory. Under a torch function mode this runs Python code.
pybind11::object storage_of(PyObject* tensor);
bool has_function_mode();

// The value of a property or slot of a class, which saves the search for it by its name.
pybind11::object get_member(PyObject* member, PyObject* object);

// An attribute by its interned name.
pybind11::object attribute(PyObject* object, const pybind11::str& name);

// The value of a dict's key, borrowed; null if there is none.
PyObject* lookup(PyObject* dict, const pybind11::handle& key);

// For messages.
std::string type_name(PyObject* object);
std::string shape_text(pybind11::handle tensor);
std::string text_of(PyObject* object, const char* attribute);

}  // namespace onepass
