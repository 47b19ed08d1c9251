// The part of the DLPack 1.3 ABI that reads a tensor without owning it (https://dmlc.github.io/dlpack, C exchange API).
#pragma once

#include <cstdint>

namespace strobe::python {

struct DLTensor {
  void* data;
  struct {
    int32_t type, id;
  } device;
  int32_t ndim;
  struct {
    uint8_t code, bits;
    uint16_t lanes;
  } dtype;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
};

struct DLPackExchangeAPI {
  struct {
    uint32_t major, minor;
  } version;
  DLPackExchangeAPI* previous;
  void* managed_tensor_allocator;
  void* managed_tensor_from_py_object_no_sync;
  void* managed_tensor_to_py_object_no_sync;
  int (*dltensor_from_py_object_no_sync)(void* object, DLTensor* out);
  int (*current_work_stream)(int32_t device_type, int32_t device_id, void** stream);
};

constexpr int32_t kDLCPU = 1, kDLCUDA = 2;

enum DLCode : uint8_t { kDLInt = 0, kDLFloat = 2, kDLBfloat = 4 };

}  // namespace strobe::python
