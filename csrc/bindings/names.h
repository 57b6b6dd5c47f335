// Names of attributes and keys that a step looks up, interned once.
#pragma once

#include <pybind11/pybind11.h>

#include <string>

namespace onepass {

pybind11::str interned(const std::string& text);

struct Names {
  pybind11::str state, param_groups, params, maximize, differentiable, param_names, step, master, master_low, version,
      rounding_seed, stochastic_rounding;
};

const Names& names();

}  // namespace onepass
