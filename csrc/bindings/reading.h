// A parameter on its way into a job, which the parts of ParamReader hand to each other.
#pragma once

#include <pybind11/pybind11.h>

#include <array>
#include <string>
#include <utility>

#include "bindings/param_reader.h"

namespace onepass {

// The functions that read one return false, and why in param.reason, when torch's code has to take the parameter; what
// nobody can step, they refuse.
struct Reading {
  Param& param;
  std::size_t number;
  PyObject* object;
  const Gradient& gradient;
  PyObject* local = nullptr;  // the part in memory: the object or, of a DTensor, what this process holds of it
  cuda::DeviceJob device_job{};
  Views views{};
  bool packed = false;   // the parameter's elements follow each other in memory, in some order of dimensions
  bool missing = false;  // a state has yet to be created
  std::array<Scalar, 1 + kMaxScalars> scalars{};  // in the order of RuleNames::scalars

  Job& job() { return device_job.job; }
  const Job& job() const { return device_job.job; }
  TensorView& own() { return views[kParam]; }
  const TensorView& own() const { return views[kParam]; }
  bool is_shard() const { return local != object; }
  bool fall_back(std::string why) {
    param.reason = std::move(why);
    return false;
  }
  bool has_strides_of_param(std::size_t operand) const {
    return same_numbers(views[operand].strides, own().strides, own().ndim);
  }
};

}  // namespace onepass
