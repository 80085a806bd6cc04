// SPDX-License-Identifier: Apache-2.0
#include "objects.h"

#include <algorithm>
#include <cstring>
#include <exception>

#include "../sim_api.h"
#include "kernel.h"

namespace ascend_sim {

at::ScalarType scalar_type(aclDataType type) {
  switch (type) {
    case ACL_FLOAT:
      return at::kFloat;
    case ACL_FLOAT16:
      return at::kHalf;
    case ACL_BF16:
      return at::kBFloat16;
    case ACL_DOUBLE:
      return at::kDouble;
    case ACL_INT8:
      return at::kChar;
    case ACL_INT16:
      return at::kShort;
    case ACL_INT32:
      return at::kInt;
    case ACL_INT64:
      return at::kLong;
    case ACL_UINT8:
      return at::kByte;
    case ACL_UINT16:
      return at::kUInt16;
    case ACL_UINT32:
      return at::kUInt32;
    case ACL_UINT64:
      return at::kUInt64;
    case ACL_BOOL:
      return at::kBool;
    case ACL_COMPLEX32:
      return at::kComplexHalf;
    case ACL_COMPLEX64:
      return at::kComplexFloat;
    case ACL_COMPLEX128:
      return at::kComplexDouble;
    default:
      TORCH_CHECK(false, "the simulator has no data type ", static_cast<int>(type));
  }
}

namespace {

// The number behind `value`, which is one element of type `dtype`.
at::Scalar read_scalar(const void* value, at::ScalarType dtype) {
  at::Scalar result;
  auto read = [&]<typename T>(T element) {
    std::memcpy(&element, value, sizeof(T));
    result = element;
  };
  switch (dtype) {
    case at::kFloat:
      read(float{});
      break;
    case at::kHalf:
      read(at::Half{});
      break;
    case at::kBFloat16:
      read(at::BFloat16{});
      break;
    case at::kDouble:
      read(double{});
      break;
    case at::kChar:
      read(int8_t{});
      break;
    case at::kShort:
      read(int16_t{});
      break;
    case at::kInt:
      read(int32_t{});
      break;
    case at::kLong:
      read(int64_t{});
      break;
    case at::kByte:
      read(uint8_t{});
      break;
    case at::kUInt16:
      read(uint16_t{});
      break;
    case at::kUInt32:
      read(uint32_t{});
      break;
    case at::kUInt64:
      read(uint64_t{});
      break;
    case at::kBool:
      read(bool{});
      break;
    case at::kComplexFloat:
      read(c10::complex<float>{});
      break;
    case at::kComplexDouble:
      read(c10::complex<double>{});
      break;
    default:
      TORCH_CHECK(false, "the simulator has no scalars of type ", dtype);
  }
  return result;
}

template <typename T>
int destroy(const T* object) {
  delete object;
  return ACL_SUCCESS;
}

// The base formats lay elements out by their strides; the private ones tile them.
bool is_base_format(aclFormat format) {
  switch (format) {
    case ACL_FORMAT_ND:
    case ACL_FORMAT_NCHW:
    case ACL_FORMAT_NHWC:
    case ACL_FORMAT_NCDHW:
    case ACL_FORMAT_NCL:
      return true;
    default:
      return false;
  }
}

}  // namespace
}  // namespace ascend_sim

using ascend_sim::destroy;

ASCEND_SIM_API aclTensor* aclCreateTensor(const int64_t* shape, uint64_t dims, aclDataType type,
                                          const int64_t* strides, int64_t offset, aclFormat format,
                                          const int64_t* /*storage_shape*/,
                                          uint64_t /*storage_dims*/, void* data) {
  auto tensor = std::make_unique<aclTensor>();
  tensor->shape = std::make_shared<std::vector<int64_t>>(shape, shape + dims);
  tensor->strides.assign(strides, strides + dims);
  tensor->offset = offset;
  tensor->storage = data;
  // A null pointer would look like an optional tensor that isn't given: the kernel says it.
  try {
    TORCH_CHECK(ascend_sim::is_base_format(format), "the simulator has no private formats (",
                static_cast<int>(format), ")");
    tensor->dtype = ascend_sim::scalar_type(type);
  } catch (const std::exception& error) {
    tensor->problem = ascend_sim::first_line(error);
  }
  return tensor.release();
}

ASCEND_SIM_API aclScalar* aclCreateScalar(const void* value, aclDataType type) {
  try {
    return new aclScalar{ascend_sim::read_scalar(value, ascend_sim::scalar_type(type))};
  } catch (const std::exception& error) {
    ascend_sim_fail(ascend_sim::kParameterError, "aclCreateScalar: %s",
                    ascend_sim::first_line(error).c_str());
    return nullptr;
  }
}

ASCEND_SIM_API aclIntArray* aclCreateIntArray(const int64_t* values, uint64_t size) {
  return new aclIntArray{std::vector<int64_t>(values, values + size)};
}

ASCEND_SIM_API aclFloatArray* aclCreateFloatArray(const float* values, uint64_t size) {
  return new aclFloatArray{std::vector<float>(values, values + size)};
}

ASCEND_SIM_API aclBoolArray* aclCreateBoolArray(const bool* values, uint64_t size) {
  return new aclBoolArray{std::vector<bool>(values, values + size)};
}

ASCEND_SIM_API aclTensorList* aclCreateTensorList(const aclTensor* const* tensors, uint64_t size) {
  auto* list = new aclTensorList;
  for (uint64_t i = 0; i < size; ++i) {
    list->tensors.emplace_back(tensors[i]);
  }
  return list;
}

ASCEND_SIM_API aclScalarList* aclCreateScalarList(const aclScalar* const* scalars, uint64_t size) {
  auto* list = new aclScalarList;
  for (uint64_t i = 0; i < size; ++i) {
    list->scalars.emplace_back(scalars[i]);
  }
  return list;
}

ASCEND_SIM_API int aclDestroyTensor(const aclTensor* tensor) { return destroy(tensor); }
ASCEND_SIM_API int aclDestroyScalar(const aclScalar* scalar) { return destroy(scalar); }
ASCEND_SIM_API int aclDestroyIntArray(const aclIntArray* array) { return destroy(array); }
ASCEND_SIM_API int aclDestroyFloatArray(const aclFloatArray* array) { return destroy(array); }
ASCEND_SIM_API int aclDestroyBoolArray(const aclBoolArray* array) { return destroy(array); }
ASCEND_SIM_API int aclDestroyTensorList(const aclTensorList* list) { return destroy(list); }
ASCEND_SIM_API int aclDestroyScalarList(const aclScalarList* list) { return destroy(list); }

// The caller frees `dims` by delete[].
ASCEND_SIM_API int aclGetViewShape(const aclTensor* tensor, int64_t** dims, uint64_t* count) {
  if (tensor == nullptr || dims == nullptr || count == nullptr) {
    ascend_sim_fail(ascend_sim::kParameterError, "aclGetViewShape: an argument is null");
    return ascend_sim::kParameterError;
  }
  *count = tensor->shape->size();
  *dims = new int64_t[*count];
  std::copy(tensor->shape->begin(), tensor->shape->end(), *dims);
  return ACL_SUCCESS;
}
