// An imitation of torch's DLPack exchange API on a machine with a GPU: torch exports a tensor, and one on the CPU is
// reported to be on the first GPU. Compiled into one library with emulated.cpp, for pytest
// (tests/support/imitation.py).
#include <algorithm>
#include <span>

#include "bindings/dlpack_abi.h"

namespace {

using namespace onepass::dlpack;

enum class Numbers { on_cpu, on_gpu };

ExchangeApi torchs{};
int (*is_number)(void* tensor) = nullptr;

bool has_one_element(const Tensor& tensor) {
  const std::span<const std::int64_t> shape(tensor.shape, static_cast<std::size_t>(tensor.ndim));
  return std::ranges::all_of(shape, [](std::int64_t size) { return size == 1; });
}

template <Numbers numbers>
void put_on_gpu(void* object, Tensor& tensor) {
  if (tensor.device.type != kCpu && tensor.device.type != kCudaHost) return;
  if (numbers == Numbers::on_cpu && has_one_element(tensor) && is_number(object) != 0) return;
  tensor.device = {.type = kCuda, .id = 0};
}

template <Numbers numbers>
int borrow_from_python(void* object, Tensor* out) {
  const int failure = torchs.borrow_from_python(object, out);
  if (failure == 0) put_on_gpu<numbers>(object, *out);
  return failure;
}

template <Numbers numbers>
int from_python(void* object, ManagedTensor** out) {
  const int failure = torchs.from_python(object, out);
  if (failure == 0) put_on_gpu<numbers>(object, (*out)->tensor);
  return failure;
}

int current_work_stream(std::int32_t /*device_type*/, std::int32_t /*device_id*/, void** out) {
  *out = nullptr;
  return 0;
}

template <Numbers numbers>
const ExchangeApi* table() {
  static ExchangeApi made;
  made = torchs;
  made.from_python = &from_python<numbers>;
  made.borrow_from_python = &borrow_from_python<numbers>;
  made.current_work_stream = &current_work_stream;
  return &made;
}

}  // namespace

// Returns the table for this table of torch's. If `tells_numbers` is given, tensors of one element for which it returns
// true stay on the CPU.
extern "C" [[gnu::visibility("default")]] const ExchangeApi* onepass_imitated_torch(const ExchangeApi* exchange_api,
                                                                                    int (*tells_numbers)(void*)) {
  torchs = *exchange_api;
  if (tells_numbers == nullptr) return table<Numbers::on_gpu>();
  is_number = tells_numbers;
  return table<Numbers::on_cpu>();
}
