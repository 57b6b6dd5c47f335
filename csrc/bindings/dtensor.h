// DTensors: tensors that are spread over processes. A step works on the part that this process holds.
#pragma once

#include <pybind11/pybind11.h>

#include <array>
#include <cstddef>

#include "job.h"

namespace onepass {

// Whether it is a torch.distributed.tensor.DTensor.
bool is_dtensor(PyObject* tensor);

// What a DTensor holds in this process.
pybind11::object local_of(PyObject* dtensor);

// Whether torch would take this tensor, which is no DTensor, for a replicated one beside DTensors.
bool passes_for_replicated(PyObject* tensor);

// How a parameter is spread over processes, and how the specs of its gradient and states were found to compare with its
// own. A spec (DTensorSpec) is never changed by torch once tensors share it, so one is compared once and then
// recognised.
class Spread {
 public:
  // Takes the spec of a parameter; findings for another one are forgotten.
  void read(PyObject* dtensor);

  enum class Match { same, other_shape, other_mesh, other_placements };

  // Whether the gradient or state that is this operand is spread as the parameter. Sets `ran_python` where the
  // comparison may run Python code.
  Match compare(std::size_t operand, PyObject* dtensor, PyObject* param, bool& ran_python);

 private:
  struct Compared {
    pybind11::object spec;
    Match match = Match::same;
  };

  pybind11::object own_;
  std::array<Compared, kMaxOperands> known_;
};

}  // namespace onepass
