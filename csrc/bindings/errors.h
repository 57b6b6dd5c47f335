// Exceptions that pybind11 has no class for.
#pragma once

#include <pybind11/pybind11.h>

namespace onepass {

// Python's ZeroDivisionError. torch raises it where a constant of the step is divided by zero.
struct ZeroDivision : pybind11::builtin_exception {
  using builtin_exception::builtin_exception;
  void set_error() const override { pybind11::set_error(PyExc_ZeroDivisionError, what()); }
};

}  // namespace onepass
