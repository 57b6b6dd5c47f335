// Our declaration of DLPack's ABI against torch's dlpack.h (see CMakeLists.txt).
#include "bindings/dlpack_abi.h"

#include <doctest/doctest.h>

#include <type_traits>

#include ONEPASS_DLPACK_HEADER

namespace onepass::dlpack {
namespace {

static_assert(DLPACK_MAJOR_VERSION == 1, "DLPack has another ABI: dlpack_abi.h and DlpackReader are of version 1");

#define SAME_SIZE(Ours, Theirs)            \
  CHECK(sizeof(Ours) == sizeof(Theirs));   \
  CHECK(alignof(Ours) == alignof(Theirs)); \
  CHECK((std::is_standard_layout_v<Ours> && std::is_trivially_copyable_v<Ours>))

#define SAME_MEMBER(Ours, our_member, Theirs, their_member)            \
  CHECK(offsetof(Ours, our_member) == offsetof(Theirs, their_member)); \
  CHECK(sizeof(Ours::our_member) == sizeof(decltype(Theirs::their_member)))

// Whether two functions have the same return type, and the same number of arguments of the same sizes. Pointers are to
// structs of different names.
template <class Ours, class Theirs>
struct CalledAlike : std::false_type {};
template <class Result, class... Ours, class... Theirs>
  requires(sizeof...(Ours) == sizeof...(Theirs))
struct CalledAlike<Result (*)(Ours...), Result (*)(Theirs...)>
    : std::bool_constant<((sizeof(Ours) == sizeof(Theirs) && std::is_pointer_v<Ours> == std::is_pointer_v<Theirs>) &&
                          ...)> {};

TEST_CASE("devices") {
  SAME_SIZE(Device, DLDevice);
  SAME_MEMBER(Device, type, DLDevice, device_type);
  SAME_MEMBER(Device, id, DLDevice, device_id);
  CHECK(int{kCpu} == int{kDLCPU});
  CHECK(int{kCuda} == int{kDLCUDA});
  CHECK(int{kCudaHost} == int{kDLCUDAHost});
}

TEST_CASE("types of numbers") {
  SAME_SIZE(DataType, DLDataType);
  SAME_MEMBER(DataType, code, DLDataType, code);
  SAME_MEMBER(DataType, bits, DLDataType, bits);
  SAME_MEMBER(DataType, lanes, DLDataType, lanes);
  CHECK(unsigned{kInt} == unsigned{kDLInt});
  CHECK(unsigned{kFloat} == unsigned{kDLFloat});
  CHECK(unsigned{kBfloat} == unsigned{kDLBfloat});
  CHECK(unsigned{kComplex} == unsigned{kDLComplex});
}

TEST_CASE("tensors") {
  SAME_SIZE(Tensor, DLTensor);
  SAME_MEMBER(Tensor, data, DLTensor, data);
  SAME_MEMBER(Tensor, device, DLTensor, device);
  SAME_MEMBER(Tensor, ndim, DLTensor, ndim);
  SAME_MEMBER(Tensor, dtype, DLTensor, dtype);
  SAME_MEMBER(Tensor, shape, DLTensor, shape);
  SAME_MEMBER(Tensor, strides, DLTensor, strides);
  SAME_MEMBER(Tensor, byte_offset, DLTensor, byte_offset);
}

TEST_CASE("managed tensors") {
  SAME_SIZE(ManagedTensor, DLManagedTensorVersioned);
  SAME_MEMBER(ManagedTensor, major, DLManagedTensorVersioned, version.major);
  SAME_MEMBER(ManagedTensor, minor, DLManagedTensorVersioned, version.minor);
  SAME_MEMBER(ManagedTensor, manager, DLManagedTensorVersioned, manager_ctx);
  SAME_MEMBER(ManagedTensor, deleter, DLManagedTensorVersioned, deleter);
  SAME_MEMBER(ManagedTensor, flags, DLManagedTensorVersioned, flags);
  SAME_MEMBER(ManagedTensor, tensor, DLManagedTensorVersioned, dl_tensor);
  CHECK((CalledAlike<decltype(ManagedTensor::deleter), decltype(DLManagedTensorVersioned::deleter)>::value));
}

TEST_CASE("the exchange API") {
  SAME_SIZE(ExchangeApi, DLPackExchangeAPI);
  SAME_MEMBER(ExchangeApi, major, DLPackExchangeAPI, header.version.major);
  SAME_MEMBER(ExchangeApi, minor, DLPackExchangeAPI, header.version.minor);
  SAME_MEMBER(ExchangeApi, previous, DLPackExchangeAPI, header.prev_api);
  SAME_MEMBER(ExchangeApi, allocate, DLPackExchangeAPI, managed_tensor_allocator);
  SAME_MEMBER(ExchangeApi, from_python, DLPackExchangeAPI, managed_tensor_from_py_object_no_sync);
  SAME_MEMBER(ExchangeApi, to_python, DLPackExchangeAPI, managed_tensor_to_py_object_no_sync);
  SAME_MEMBER(ExchangeApi, borrow_from_python, DLPackExchangeAPI, dltensor_from_py_object_no_sync);
  SAME_MEMBER(ExchangeApi, current_work_stream, DLPackExchangeAPI, current_work_stream);
  CHECK((CalledAlike<decltype(ExchangeApi::from_python), DLPackManagedTensorFromPyObjectNoSync>::value));
  CHECK((CalledAlike<decltype(ExchangeApi::borrow_from_python), DLPackDLTensorFromPyObjectNoSync>::value));
  CHECK((CalledAlike<decltype(ExchangeApi::current_work_stream), DLPackCurrentWorkStream>::value));
}

}  // namespace
}  // namespace onepass::dlpack
