// When kernels run without the GIL, and which references are held meanwhile.
//
// While a step holds the GIL, no other thread can free what it reads and writes. Without the GIL, another thread may
// replace a state, call load_state_dict or set p.data, which frees the memory that kernels work on. So a step takes
// references to its tensors and to their storages before it releases the GIL. That costs 60 ns for each tensor. A step
// of small tensors, for which this would be too much, keeps the GIL.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <span>
#include <vector>

namespace onepass {

// References to objects and, for plain tensors, to their storages.
class Owned {
 public:
  explicit Owned(std::span<PyObject* const> objects);

 private:
  std::vector<pybind11::object> references_;
};

// Whether to release the GIL for work that moves this many bytes of this many tensors: the work is long enough, and
// taking references to the storages runs no Python code.
bool lets_others_run(std::int64_t bytes, std::size_t tensors);

// Calls `work`, which moves this many bytes of these objects' memory and does not use Python. Releases the GIL if the
// work is long. No Python code may have run since the addresses were read.
template <class Work>
void run_without_python(std::int64_t bytes, std::span<PyObject* const> objects, Work&& work) {
  if (!lets_others_run(bytes, objects.size())) return work();
  const Owned owned(objects);
  const pybind11::gil_scoped_release release;
  work();
}

}  // namespace onepass
