#include "bindings/ownership.h"

#include "bindings/torch.h"

namespace py = pybind11;

namespace onepass {
namespace {

// Disables Python's garbage collector, which could run finalizers, and so Python code.
class NoGarbageCollection {
 public:
  NoGarbageCollection() : was_enabled_(PyGC_Disable() != 0) {}
  ~NoGarbageCollection() {
    if (was_enabled_) PyGC_Enable();
  }
  NoGarbageCollection(const NoGarbageCollection&) = delete;
  NoGarbageCollection& operator=(const NoGarbageCollection&) = delete;

 private:
  bool was_enabled_;
};

constexpr std::int64_t kLong = std::int64_t{16} << 20;         // bytes: half a millisecond
constexpr std::int64_t kLargeTensor = std::int64_t{64} << 10;  // bytes: 2 us

}  // namespace

bool lets_others_run(std::int64_t bytes, std::size_t tensors) {
  return bytes >= kLong && bytes >= static_cast<std::int64_t>(tensors) * kLargeTensor && !has_function_mode();
}

Owned::Owned(std::span<PyObject* const> objects) {
  const NoGarbageCollection pause;  // torch may create a storage's Python object here
  references_.reserve(2 * objects.size());
  for (PyObject* object : objects) {
    references_.push_back(py::reinterpret_borrow<py::object>(object));
    if (is_plain(object)) references_.push_back(storage_of(object));
  }
}

}  // namespace onepass
