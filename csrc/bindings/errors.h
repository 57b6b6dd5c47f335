// Exceptions that pybind11 has no class for.
#pragma once

#include <stdexcept>

namespace onepass {

// Python's ZeroDivisionError. torch raises it where a constant of the step is divided by zero.
struct ZeroDivision : std::runtime_error {
  using std::runtime_error::runtime_error;
};

}  // namespace onepass
