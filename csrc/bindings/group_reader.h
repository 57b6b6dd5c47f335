// Parameter groups: from Python's dicts to hyperparameters.
#pragma once

#include <pybind11/pybind11.h>

#include <array>
#include <cstddef>
#include <deque>
#include <string>
#include <utility>
#include <vector>

#include "cuda/step.h"
#include "rules/registry.h"
#include "rules/table.h"

namespace onepass {

// What is known of a parameter group.
struct Group {
  std::size_t index = 0;
  const PyObject* dict = nullptr;  // whose items these are; null: to be read
  // What the dict held when it was read, but for `params`.
  std::vector<std::pair<pybind11::object, pybind11::object>> items;
  bool has_mutable_values = true;  // a tensor lr: that it is the same object proves nothing
  std::array<double, kMaxHyper> hyper{};
  // The same with those that are tensors on a GPU, whose values are unknown here: 1 stands for them in `hyper`.
  std::array<cuda::Number, kMaxHyper> device_hyper{};
  int device = -1;  // the GPU that they are on; -1: there are none
  double sign = 1.0;
  bool differentiable = false;
  unsigned states_used = 0;  // a bit for each that parameters may have
  bool takes_sparse = false;
};

// Reads the groups of one optimizer. Values are read only where a group holds other objects than at the last step: a
// schedule that sets group["lr"] puts a new float there, and comparing a dozen pointers is several times cheaper.
class GroupReader {
 public:
  explicit GroupReader(const RuleInfo& info);

  // Makes room for so many groups. False if there were as many.
  bool resize(std::size_t count);

  // Reads a group, which may run Python code (a tensor's item(), a sequence's __getitem__). Returns its parameters, a
  // list or tuple. Throws TypeError, ValueError or KeyError with a message that begins with `label`, and what that code
  // throws.
  pybind11::object read(std::size_t index, const pybind11::dict& dict, const std::string& label);

  // Reads the hyperparameters that are on a GPU, which waits for it: they are needed here.
  void fetch_from_device(Group& group, const pybind11::dict& dict) const;

  Group& operator[](std::size_t index) { return groups_[index]; }

  // For Python's garbage collector.
  int traverse(visitproc visit, void* arg) const;
  void clear();

 private:
  struct HyperName {
    pybind11::str key;
    int index;      // of the element, where the value is a sequence; else -1
    int count = 0;  // of the sequence's elements
    bool optional;  // may be None or missing, which is read as -1
    bool flag;      // true or false; None is false

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
