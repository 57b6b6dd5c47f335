// The memory of tensors, read through DLPack's C exchange API.
#pragma once

#include <pybind11/pybind11.h>

#include <cstddef>
#include <cstdint>
#include <list>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "bindings/dlpack_abi.h"
#include "formats/format.h"
#include "overlap.h"

namespace onepass {

// A tensor's memory. A complex tensor is viewed as real, with a last dimension of 2. Shape and strides are in `room`,
// or borrowed from torch and valid until Python code can run again.
struct TensorView {
  std::byte* data = nullptr;
  std::optional<Format> format;  // none: a dtype without a codec
  bool on_cpu = false;
  int cuda = -1;  // the index of its CUDA device; -1: on none
  bool complex = false;
  bool int64 = false;
  bool int16 = false;
  bool float8_e4m3fn = false;   // codes of a state in blocks
  bool float8_e8m0fnu = false;  // their scales
  int ndim = 0;
  const std::int64_t* shape = nullptr;
  const std::int64_t* strides = nullptr;
  std::shared_ptr<const std::vector<std::int64_t>> room;  // shape and strides, if they differ from torch's
};

inline std::span<const std::int64_t> shape_of(const TensorView& view) {
  return {view.shape, static_cast<std::size_t>(view.ndim)};
}

inline std::span<const std::int64_t> strides_of(const TensorView& view) {
  return {view.strides, static_cast<std::size_t>(view.ndim)};
}

inline bool same_numbers(const std::int64_t* a, const std::int64_t* b, int n) {
  for (int i = 0; i < n; ++i)  // for a few numbers faster than a call of memcmp
    if (a[i] != b[i]) return false;
  return true;
}

inline std::int64_t elements_of(const TensorView& view) {
  std::int64_t elements = 1;
  for (int d = 0; d < view.ndim; ++d) elements *= view.shape[d];
  return elements;
}

// Whether it is one float32 or float64 value, in any number of dimensions.
inline bool is_one_float(const TensorView& view) {
  for (int d = 0; d < view.ndim; ++d)
    if (view.shape[d] != 1) return false;
  return !view.complex && (view.format == Format::float32 || view.format == Format::float64);
}

inline bool same_device(const TensorView& a, const TensorView& b) { return a.on_cpu == b.on_cpu && a.cuda == b.cuda; }

inline bool same_shape(const TensorView& a, const TensorView& b) {
  return a.ndim == b.ndim && a.complex == b.complex && same_numbers(a.shape, b.shape, a.ndim);
}

// Returns the memory of a tensor whose format is known. If there are gaps, its spacing is added to `spacings`.
MemoryRange memory_of(const TensorView& view, std::size_t owner, std::list<Spacing>& spacings);

class DlpackReader {
 public:
  // `exchange_api` is the capsule `torch.Tensor.__dlpack_c_exchange_api__`, or None if torch has none. Throws
  // py::import_error for None, and if the capsule has no version 1.
  explicit DlpackReader(const pybind11::handle& exchange_api);

  // Views a tensor. Returns false, with no Python error set, if torch does not export it (sparse, meta) or it has no
  // memory.
  bool view(PyObject* tensor, TensorView& out);

  // Returns torch's current stream on a GPU.
  void* current_stream(int cuda) const;

  std::pair<unsigned, unsigned> version() const { return {major_, minor_}; }

 private:
  std::uint32_t major_ = 0;
  std::uint32_t minor_ = 0;
  decltype(dlpack::ExchangeApi::from_python) own_ = nullptr;
  decltype(dlpack::ExchangeApi::borrow_from_python) borrow_ = nullptr;
  decltype(dlpack::ExchangeApi::current_work_stream) current_work_stream_ = nullptr;
};

}  // namespace onepass
