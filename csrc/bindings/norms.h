// Norms of lists of tensors, for `log_to`, and of gradients, which are scaled to clip them.
#pragma once

#include <pybind11/pybind11.h>

namespace onepass {

void define_norms(pybind11::module_& m);

}  // namespace onepass
