// The part of DLPack's C ABI, version 1.3, that the core uses. It is declared here so that onepass is built without
// torch's headers. tests/cpp/dlpack_abi_test.cpp compares it with torch's dlpack.h.
#pragma once

#include <cstddef>
#include <cstdint>

namespace onepass::dlpack {

enum DeviceType : std::int32_t {
  kCpu = 1,
  kCuda = 2,
  kCudaHost = 3,  // memory of the CPU, page-locked for CUDA
};

enum TypeCode : std::uint8_t {
  kInt = 0,
  kFloat = 2,
  kBfloat = 4,
  kComplex = 5,
  kFloat8E4m3fn = 10,
  kFloat8E8m0fnu = 14,
};

struct Device {
  std::int32_t type;  // a DeviceType, or a value that is not declared here
  std::int32_t id;
};

struct DataType {
  std::uint8_t code;  // a TypeCode, or a value that is not declared here
  std::uint8_t bits;
  std::uint16_t lanes;
};

// DLTensor. Shape and strides are in elements.
struct Tensor {
  void* data;
  Device device;
  std::int32_t ndim;
  DataType dtype;
  std::int64_t* shape;
  std::int64_t* strides;
  std::uint64_t byte_offset;
};

// DLManagedTensorVersioned.
struct ManagedTensor {
  std::uint32_t major;
  std::uint32_t minor;
  void* manager;
  void (*deleter)(ManagedTensor* self);  // may be null
  std::uint64_t flags;
  Tensor tensor;
};

// DLPackExchangeAPI, with the members of its header. If `major` is not 1, only the versions and `previous` may be read.
// Functions return 0, or -1 with a Python exception set.
struct ExchangeApi {
  std::uint32_t major;
  std::uint32_t minor;
  ExchangeApi* previous;
  void (*allocate)();  // not used, as is to_python
  int (*from_python)(void* object, ManagedTensor** out);
  void (*to_python)();
  int (*borrow_from_python)(void* object, Tensor* out);  // may be null
  int (*current_work_stream)(std::int32_t device_type, std::int32_t device_id, void** out);
};

static_assert(sizeof(void*) == 8 && sizeof(void (*)()) == 8, "the layout below is that of 64-bit machines");

static_assert(sizeof(Device) == 8);
static_assert(offsetof(Device, type) == 0);
static_assert(offsetof(Device, id) == 4);

static_assert(sizeof(DataType) == 4);
static_assert(offsetof(DataType, code) == 0);
static_assert(offsetof(DataType, bits) == 1);
static_assert(offsetof(DataType, lanes) == 2);

static_assert(sizeof(Tensor) == 48);
static_assert(offsetof(Tensor, data) == 0);
static_assert(offsetof(Tensor, device) == 8);
static_assert(offsetof(Tensor, ndim) == 16);
static_assert(offsetof(Tensor, dtype) == 20);
static_assert(offsetof(Tensor, shape) == 24);
static_assert(offsetof(Tensor, strides) == 32);
static_assert(offsetof(Tensor, byte_offset) == 40);

static_assert(sizeof(ManagedTensor) == 80);
static_assert(offsetof(ManagedTensor, major) == 0);
static_assert(offsetof(ManagedTensor, minor) == 4);
static_assert(offsetof(ManagedTensor, manager) == 8);
static_assert(offsetof(ManagedTensor, deleter) == 16);
static_assert(offsetof(ManagedTensor, flags) == 24);
static_assert(offsetof(ManagedTensor, tensor) == 32);

static_assert(sizeof(ExchangeApi) == 56);
static_assert(offsetof(ExchangeApi, major) == 0);
static_assert(offsetof(ExchangeApi, minor) == 4);
static_assert(offsetof(ExchangeApi, previous) == 8);
static_assert(offsetof(ExchangeApi, allocate) == 16);
static_assert(offsetof(ExchangeApi, from_python) == 24);
static_assert(offsetof(ExchangeApi, to_python) == 32);
static_assert(offsetof(ExchangeApi, borrow_from_python) == 40);
static_assert(offsetof(ExchangeApi, current_work_stream) == 48);

}  // namespace onepass::dlpack
