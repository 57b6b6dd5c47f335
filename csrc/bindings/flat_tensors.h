// Python's tensors as the parts of one flat vector (cpu/flat.h).
#pragma once

#include <cstdint>
#include <deque>
#include <vector>

#include "bindings/dlpack.h"
#include "cpu/flat.h"
#include "layout.h"

namespace onepass {

// The tensors of all groups. Valid until Python code can run again.
struct FlatTensors {
  std::vector<PyObject*> used;  // the tensors, borrowed
  std::vector<Part> parts;
  std::vector<std::int64_t> ends;  // of the groups
  std::deque<Layout> layouts;      // of the parts

  std::int64_t length() const { return ends.empty() ? 0 : ends.back(); }
  void open_group() { ends.push_back(length()); }
  void add(PyObject* tensor, const TensorView& view);  // to the last group; a view without data stands for zeros
};

}  // namespace onepass
