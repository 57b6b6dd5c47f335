#include "bindings/dlpack.h"

#include <algorithm>
#include <utility>

#include "layout.h"

namespace py = pybind11;

namespace onepass {
namespace {

std::optional<Format> format_of(std::uint8_t code, int bits) {
  if (code == dlpack::kBfloat && bits == 16) return Format::bfloat16;
  if (code != dlpack::kFloat && code != dlpack::kComplex) return std::nullopt;
  if (code == dlpack::kComplex) bits /= 2;
  if (bits == 16) return Format::float16;
  if (bits == 32) return Format::float32;
  if (bits == 64) return Format::float64;
  return std::nullopt;
}

// Gives a view a shape and strides of its own. They are not shared between views, because other threads read tensors
// while torch has released the GIL.
void keep(TensorView& view, std::vector<std::int64_t> shape, const std::vector<std::int64_t>& strides) {
  const std::size_t ndim = shape.size();
  shape.insert(shape.end(), strides.begin(), strides.end());
  view.room = std::make_shared<const std::vector<std::int64_t>>(std::move(shape));
  view.ndim = static_cast<int>(ndim);
  view.shape = view.room->data();
  view.strides = view.shape + ndim;
}

}  // namespace

MemoryRange memory_of(const TensorView& view, std::size_t owner, std::list<Spacing>& spacings) {
  const std::size_t size = size_of(*view.format);
  const std::int64_t elements = extent(shape_of(view), strides_of(view));
  MemoryRange range{.first = view.data, .past = view.data + elements * static_cast<std::int64_t>(size), .owner = owner};
  if (elements > elements_of(view))
    range.spacing = &spacings.emplace_back(spacing_of(shape_of(view), strides_of(view), size));
  return range;
}

DlpackReader::DlpackReader(const py::handle& exchange_api) {
  if (exchange_api.is_none())
    throw py::import_error("onepass needs torch >= 2.10: torch.Tensor has no __dlpack_c_exchange_api__");
  const auto* api =
      static_cast<const dlpack::ExchangeApi*>(PyCapsule_GetPointer(exchange_api.ptr(), "dlpack_exchange_api"));
  if (api == nullptr) throw py::error_already_set();
  while (api != nullptr && api->major != 1) api = api->previous;
  if (api == nullptr) throw py::import_error("onepass needs version 1 of DLPack's exchange API; this torch has none");
  major_ = api->major;
  minor_ = api->minor;
  own_ = api->from_python;
  borrow_ = api->borrow_from_python;
  current_work_stream_ = api->current_work_stream;
}

bool DlpackReader::view(PyObject* tensor, TensorView& out) {
  dlpack::Tensor exported{};
  std::vector<std::int64_t> sizes;  // copies of shape and strides, if they are needed
  std::vector<std::int64_t> strides;
  const auto copy = [&] {
    sizes.assign(exported.shape, exported.shape + exported.ndim);
    strides.assign(exported.strides, exported.strides + exported.ndim);
  };
  if (borrow_ != nullptr) {
    if (borrow_(tensor, &exported) != 0) {
      PyErr_Clear();
      return false;
    }
  } else {
    dlpack::ManagedTensor* managed = nullptr;
    if (own_(tensor, &managed) != 0) {
      PyErr_Clear();
      return false;
    }
    exported = managed->tensor;
    copy();
    exported.shape = sizes.data();
    exported.strides = strides.data();
    if (managed->deleter != nullptr) managed->deleter(managed);
  }
  // torch has tensors of zeros without memory (_efficientzerotensor), and a storage can be resized to 0 bytes.
  const std::span<const std::int64_t> shape(exported.shape, static_cast<std::size_t>(exported.ndim));
  if (exported.data == nullptr && std::ranges::find(shape, 0) == shape.end()) return false;
  out.data = static_cast<std::byte*>(exported.data) + exported.byte_offset;
  out.on_cpu = exported.device.type == dlpack::kCpu || exported.device.type == dlpack::kCudaHost;
  out.cuda = exported.device.type == dlpack::kCuda ? exported.device.id : -1;
  out.format = format_of(exported.dtype.code, exported.dtype.bits);
  out.complex = exported.dtype.code == dlpack::kComplex;
  out.int64 = exported.dtype.code == dlpack::kInt && exported.dtype.bits == 64;
  out.int16 = exported.dtype.code == dlpack::kInt && exported.dtype.bits == 16;
  out.float8_e4m3fn = exported.dtype.code == dlpack::kFloat8E4m3fn;
  out.float8_e8m0fnu = exported.dtype.code == dlpack::kFloat8E8m0fnu;
  if (borrow_ != nullptr && !out.complex) {
    out.room.reset();
    out.ndim = exported.ndim;
    out.shape = exported.shape;
    out.strides = exported.strides;
    return true;
  }
  if (borrow_ != nullptr) copy();
  if (out.complex) {
    std::ranges::for_each(strides, [](std::int64_t& stride) { stride *= 2; });
    sizes.push_back(2);
    strides.push_back(1);
  }
  keep(out, std::move(sizes), strides);
  return true;
}

void* DlpackReader::current_stream(int cuda) const {
  void* stream = nullptr;
  if (current_work_stream_(dlpack::kCuda, cuda, &stream) != 0) throw py::error_already_set();
  return stream;
}

}  // namespace onepass
