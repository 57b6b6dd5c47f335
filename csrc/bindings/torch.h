// What the bindings use of torch, without its headers: Python objects, and DLPack for the memory of tensors.
#pragma once

#include <pybind11/pybind11.h>

#include <cstddef>
#include <string>

#include "bindings/dlpack.h"

namespace onepass {

struct Torch {
  pybind11::object tensor_type;
  pybind11::object parameter_type;
  pybind11::object increment_version;
  pybind11::object workspace;       // (bytes, GPU or -1) -> a tensor of so many bytes
  pybind11::object add_up_sums;     // (DTensors, the bytes of sums over their parts): adds these up over processes
  pybind11::object current_device;  // () -> the index of the current GPU; written in C
  pybind11::object set_device;      // (GPU) -> None
  DlpackReader dlpack;
};

// Called by the Python layer. A later call replaces all of it, the module with the CUDA kernels included; only the two
// types must stay the same.
void set_torch(pybind11::object tensor_type, pybind11::object parameter_type, pybind11::object increment_version,
               const pybind11::object& exchange_api, pybind11::object workspace, pybind11::object add_up_sums,
               pybind11::object current_device, pybind11::object set_device);
Torch& torch();

// Returns the memory of a tensor that torch made for the core.
std::byte* data_of(const pybind11::object& tensor);

// Memory on a GPU, on the CPU if `device` is negative; null if none is needed. It belongs to torch's allocator, which
// gives it only to later work on the same stream.
struct Workspace {
  Workspace(std::size_t size, int device);

  pybind11::object tensor;
  std::byte* data = nullptr;
};

// Whether its type is torch.Tensor or Parameter, not another subclass.
bool is_plain(PyObject* tensor);

// Whether it is a torch.Tensor or an instance of a subclass.
bool is_tensor(PyObject* object);

// Returns param.grad, which may be None.
pybind11::object gradient_of(PyObject* param);

bool is_sparse(PyObject* tensor);

// Return the indices and values of a sparse tensor, coalesced or not.
pybind11::object indices_of(PyObject* sparse);
pybind11::object values_of(PyObject* sparse);

// Whether torch negates or, if it is complex, conjugates the tensor lazily: its memory then does not have its values,
// and an export does not say so. torch releases the GIL in this call.
bool is_lazy(PyObject* tensor, bool complex);

// Returns the tensor with its values in memory.
pybind11::object resolved(const pybind11::object& tensor);

// Returns the storage, which owns a tensor's memory. Under a torch function mode this runs Python code.
pybind11::object storage_of(PyObject* tensor);
bool has_function_mode();

// Returns the value of a class's property or slot for an object, without a lookup by name.
pybind11::object get_member(PyObject* member, PyObject* object);

// Returns an attribute by its interned name.
pybind11::object attribute(PyObject* object, const pybind11::str& name);

// Returns the value of a dict's key, borrowed; null if there is none.
PyObject* lookup(PyObject* dict, const pybind11::handle& key);

// For messages.
std::string type_name(PyObject* object);
std::string shape_text(pybind11::handle tensor);
std::string text_of(PyObject* object, const char* name);

}  // namespace onepass
