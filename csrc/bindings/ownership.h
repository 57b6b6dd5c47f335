// When kernels run without the GIL, and what is held meanwhile.
//
// While a step holds the GIL, no other thread can free what it reads and writes. Without the GIL, another thread may
// replace a state, call load_state_dict or set p.data, which frees the memory that kernels work on. So a step takes
// references to its tensors and to their storages before it releases the GIL. That costs 60 ns a tensor. A step of
// small tensors, for which this would be much, keeps the GIL.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <span>
#include <vector>

namespace onepass {

// References to objects and, of plain tensors, to their storages.
class Owned {
 public:
  explicit Owned(std::span<PyObject* const> objects);

 private:
  std::vector<pybind11::object> references_;
};

// Whether work that moves so many bytes of so many tensors is to let other threads run: it takes long enough, and
// holding the tensors runs no Python code.
bool lets_others_run(std::int64_t bytes, std::size_t tensors);

// Calls `work`, which moves so many bytes of these objects' memory and needs no Python, without the GIL if it is long.
// No Python code may have run since the addresses were read.
template <class Work>
void run_without_python(std::int64_t bytes, std::span<PyObject* const> objects, Work&& work) {
  if (!lets_others_run(bytes, objects.size())) return work();
  const Owned owned(objects);
  const pybind11::gil_scoped_release release;
  work();
}

}  // namespace onepass
