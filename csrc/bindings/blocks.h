// Stochastic rounding outside of a step: of float32 tensors to blocks of 8 bits (and back), and to 16 bits.
#pragma once

#include <pybind11/pybind11.h>

namespace onepass {

// Adds the functions to the module.
void bind_blocks(pybind11::module_& m);

}  // namespace onepass
