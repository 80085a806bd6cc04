// SPDX-License-Identifier: Apache-2.0
// What a program hands to an aclnn function: tensors, scalars, lists. Only descriptions: no memory
// is touched before the kernel runs.

#pragma once

#include <ATen/core/Tensor.h>
#include <acl/acl_base.h>

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

// What libatb.so, which is linked with libopapi.so, uses of it.
#define ACLNN_SHARED __attribute__((visibility("default")))

struct aclTensor {
  // Shared, because kernels whose result has a size that only they know write it back.
  std::shared_ptr<std::vector<int64_t>> shape;
  std::vector<int64_t> strides;
  int64_t offset;
  at::ScalarType dtype;
  void* storage;
  std::string problem;  // why the simulator can't use it, or empty
};

struct aclScalar {
  at::Scalar value;
};

struct aclIntArray {
  std::vector<int64_t> values;
};

struct aclFloatArray {
  std::vector<float> values;
};

struct aclBoolArray {
  std::vector<bool> values;
};

// Lists own what is in them; a tensor that isn't given is a null pointer.
struct aclTensorList {
  std::vector<std::unique_ptr<const aclTensor>> tensors;
};

struct aclScalarList {
  std::vector<std::unique_ptr<const aclScalar>> scalars;
};

namespace ascend_sim {

// Throws for a type that libtorch's CPU kernels don't know.
ACLNN_SHARED at::ScalarType scalar_type(aclDataType type);

}  // namespace ascend_sim
