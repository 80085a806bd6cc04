// SPDX-License-Identifier: Apache-2.0
// The binary interface by which array libraries hand memory to each other (DLPack 1.x): the structs
// of its C header, and the table of functions that torch.Tensor carries since torch 2.10. It is the
// only thing of torch that this extension knows, so one build serves every torch. Torch-free.

#pragma once

#include <cstdint>

namespace llmdd::dlpack {

// DLDeviceType; torch calls page-locked host memory kCpu, too.
enum DeviceType : int32_t { kCpu = 1, kExtension = 12 };
// DLDataTypeCode.
enum TypeCode : uint8_t { kInt = 0, kUInt = 1, kFloat = 2, kComplex = 5 };

struct Version {
  uint32_t major;
  uint32_t minor;
};

struct Device {
  int32_t type;
  int32_t index;
};

struct DataType {
  uint8_t code;
  uint8_t bits;
  uint16_t lanes;
};

// DLTensor. Shape and strides count elements; no strides means contiguous.
struct Tensor {
  void* data;
  Device device;
  int32_t ndim;
  DataType dtype;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
};

// DLManagedTensorVersioned.
struct ManagedTensor {
  Version version;
  void* context;
  void (*deleter)(ManagedTensor* self);
  uint64_t flags;
  Tensor tensor;
};

// DLPackExchangeAPI: what a tensor class offers, in a capsule of this name. Functions that return
// an int have set a Python error if it is not 0.
constexpr const char* kExchangeCapsule = "dlpack_exchange_api";
constexpr const char* kExchangeAttribute = "__dlpack_c_exchange_api__";
constexpr uint32_t kMajorVersion = 1;

struct Exchange {
  Version version;
  const Exchange* older;
  void* allocate;
  int (*export_owned)(void* object, ManagedTensor** out);
  int (*import_owned)(ManagedTensor* tensor, void** object);
  int (*look_at)(void* object, Tensor* out);
  void* current_work_stream;
};

}  // namespace llmdd::dlpack
