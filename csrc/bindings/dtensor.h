// DTensors: tensors that are distributed over processes. A step works on the local part, which this process holds.
#pragma once

#include <pybind11/pybind11.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>

#include "job.h"

namespace onepass {

// Whether it is a torch.distributed.tensor.DTensor.
bool is_dtensor(PyObject* tensor);

// Returns the local part of a DTensor.
pybind11::object local_of(PyObject* dtensor);

// Whether torch would treat this tensor, which is not a DTensor, as replicated in an operation with DTensors.
bool passes_for_replicated(PyObject* tensor);

// How a parameter is distributed over processes, and the results of comparing the specs of its gradient and states with
// its own. torch does not change a spec (DTensorSpec) that tensors share, so a spec is compared once, and then
// recognized as the same object.
class Spread {
 public:
  // Reads the spec of a parameter. If it is another object than before, the results are forgotten.
  void read(PyObject* dtensor);

  enum class Match { same, other_shape, other_mesh, other_placements };

  // Compares the gradient or state that is this operand with the parameter. Sets `ran_python` if the comparison may
  // have run Python code.
  Match compare(std::size_t operand, PyObject* dtensor, PyObject* param, bool& ran_python);

  // Returns the index in the whole parameter of the first row of its local part; -1 if this part has not whole rows of
  // dimension 0. Sets `ran_python` if Python code has run.
  std::int64_t first_row(PyObject* param, bool& ran_python);

  // Returns the index in the whole parameter, in row-major order, of the first element of its local part. Sets
  // `ran_python` if Python code has run.
  std::int64_t first_element(PyObject* param, bool& ran_python);

  // Returns the number of elements of the whole parameter, likewise.
  std::int64_t elements(PyObject* param, bool& ran_python);

 private:
  struct Compared {
    pybind11::object spec;
    Match match = Match::same;
  };

  pybind11::object own_;
  std::array<Compared, kAllOperands> known_;
  std::optional<std::int64_t> first_row_;
  std::optional<std::int64_t> first_element_;
  std::optional<std::int64_t> elements_;
};

}  // namespace onepass
