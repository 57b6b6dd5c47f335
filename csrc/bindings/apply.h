// A rule applied to tensors that are named one by one: for the parts of optimizers that are element-wise.
#pragma once

#include <pybind11/pybind11.h>

#include <string>
#include <vector>

#include "bindings/torch.h"

namespace onepass {

// Checks that kernels can work on a tensor: plain, neither lazily negated nor conjugated. May run Python code. Throws
// py::value_error that begins with `what` otherwise.
void require_plain(PyObject* tensor, const std::string& what);

// A view of such a tensor: on the CPU (or on a GPU, if it may be), of a known dtype. Runs no Python code. Throws
// py::value_error that begins with `what` otherwise.
TensorView require_view(PyObject* tensor, const std::string& what, bool may_be_on_cuda = false);

// Applies the rule to each row, a tuple of the parameter, the gradient and the states in use (in the rule's order).
// `hyper` is in the order of the rule's names; rules that keep scalars cannot be applied so.
void apply(const std::string& rule, const std::vector<double>& hyper, double step, const pybind11::list& rows,
           double grad_factor, int threads);

}  // namespace onepass
