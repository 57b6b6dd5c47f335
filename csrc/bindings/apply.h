// Applies a rule to given tensors: for the element-wise parts of other optimizers (Muon).
#pragma once

#include <pybind11/pybind11.h>

#include <string>
#include <vector>

#include "bindings/torch.h"

namespace onepass {

// Checks that a tensor is plain, and neither lazily negated nor lazily conjugated. Throws py::value_error, with a
// message that begins with `what`, otherwise. May run Python code.
void require_plain(PyObject* tensor, const std::string& what);

// Returns a view of such a tensor. Throws py::value_error, with a message that begins with `what`, if the tensor is not
// on the CPU (or, with `may_be_on_cuda`, on a GPU) or has a dtype without a codec. Runs no Python code.
TensorView require_view(PyObject* tensor, const std::string& what, bool may_be_on_cuda = false);

// Applies the rule to each row: a tuple of the parameter, the gradient and the states in use, in the rule's order.
// `hyper` is in the order of the rule's names. The rule must not have scalars.
void apply(const std::string& rule, const std::vector<double>& hyper, double step, const pybind11::list& rows,
           double grad_factor, int threads);

}  // namespace onepass
