// Reads parameter groups: Python's dicts into hyperparameters.
#pragma once

#include <pybind11/pybind11.h>

#include <array>
#include <cstddef>
#include <deque>
#include <string>
#include <utility>
#include <vector>

#include "cuda/step.h"
#include "job.h"
#include "rules/registry.h"
#include "rules/table.h"

namespace onepass {

// A parameter group as it was last read.
struct Group {
  std::size_t index = 0;
  const PyObject* dict = nullptr;  // the dict that it was read from; null: not read yet
  // The items of the dict when it was read, without `params`.
  std::vector<std::pair<pybind11::object, pybind11::object>> items;
  bool has_mutable_values = true;  // such as a tensor lr: the same object may have another value
  std::array<double, kMaxHyper> hyper{};
  // The same, including those that are tensors on a GPU. Their values are not known on the CPU: `hyper` has 1 for them.
  std::array<cuda::Number, kMaxHyper> device_hyper{};
  int device = -1;  // the GPU of these tensors; -1: there are none
  double sign = 1.0;
  bool differentiable = false;
  Master master = Master::none;      // of 16-bit parameters
  bool stochastic_rounding = false;  // of 16-bit parameters and states
  std::uint64_t rounding_seed = 0;
  unsigned states_used = 0;  // a bit for each state that parameters may have
  bool takes_sparse = false;
  bool takes_sums = false;  // an update depends on sums over its tensor
};

// Reads the groups of one optimizer. Values are read only if a group holds other objects than at the last step (a
// schedule that sets group["lr"] puts a new float there): comparing a dozen pointers is several times cheaper.
class GroupReader {
 public:
  explicit GroupReader(const RuleInfo& info);

  // Sets the number of groups. Returns false if it has not changed; otherwise all groups are forgotten.
  bool resize(std::size_t count);

  // Reads a group and returns its parameters, a list or tuple. May run Python code (a tensor's item(), a sequence's
  // __getitem__). Throws TypeError, ValueError or KeyError with a message that begins with `label`, and the exceptions
  // of that code.
  pybind11::object read(std::size_t index, const pybind11::dict& dict, const std::string& label);

  // Reads the values of hyperparameters that are on a GPU, and waits for it.
  void fetch_from_device(Group& group, const pybind11::dict& dict) const;

  Group& operator[](std::size_t index) { return groups_[index]; }

  // For Python's garbage collector.
  int traverse(visitproc visit, void* arg) const;
  void clear();

 private:
  struct HyperName {
    pybind11::str key;
    int index;      // of the element, if the value is a sequence; else -1
    int count = 0;  // of the sequence's elements
    bool optional;  // may be None or missing, which is read as -1
    bool flag;      // true or false; None is read as false

    std::string text() const;
  };

  void read_values(Group& group, const pybind11::dict& dict, const std::string& label) const;
  pybind11::object element(Group& group, const pybind11::object& sequence, const HyperName& name,
                           const std::string& label) const;
  double read_value(Group& group, const pybind11::object& value, const HyperName& name, cuda::Number& on_device,
                    const std::string& label) const;

  const RuleInfo& info_;
  std::vector<HyperName> hyper_names_;
  std::deque<Group> groups_;
};

}  // namespace onepass
