// Norms of lists of tensors: what the log of a run's steps is made of.
#pragma once

#include <pybind11/pybind11.h>

namespace onepass {

void define_norms(pybind11::module_& m);

}  // namespace onepass
