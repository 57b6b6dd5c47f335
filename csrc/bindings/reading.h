// A parameter while it is read into a job. The parts of ParamReader share it.
#pragma once

#include <pybind11/pybind11.h>

#include <array>
#include <string>
#include <utility>

#include "bindings/param_reader.h"

namespace onepass {

// The functions that read it return false, and set param.reason, if torch's implementation has to step the parameter.
// They throw if neither kernels nor torch can.
struct Reading {
  Param& param;
  std::size_t number;
  PyObject* object;
  const Gradient& gradient;
  PyObject* local = nullptr;  // the object or, of a DTensor, its local part
  cuda::DeviceJob device_job{};
  Views views{};
  bool packed = false;   // the parameter's elements are consecutive in memory, in some order of dimensions
  bool missing = false;  // a state has to be created
  unsigned follows = 0;  // the followers that kernels can update, a bit for each
  std::array<std::int64_t, kMaxStates> scale_bytes{};  // of states in blocks
  std::array<Scalar, 1 + kMaxScalars> scalars{};       // in the order of RuleNames::scalars

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
