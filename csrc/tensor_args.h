// SPDX-License-Identifier: Apache-2.0
// Reads the index tensors that Python hands over: int64, in host memory, contiguous.

#pragma once

#include <torch/extension.h>

#include <cstddef>
#include <cstdint>

namespace llmdd {

inline void check_index_tensor(const at::Tensor& tensor, const char* name, int64_t dims) {
  TORCH_CHECK_TYPE(tensor.scalar_type() == at::kLong, name, " must be an int64 tensor, not ",
                   tensor.scalar_type());
  TORCH_CHECK_VALUE(tensor.is_cpu() && tensor.layout() == at::kStrided, name,
                    " must be an ordinary tensor in host memory, not on ", tensor.device());
  TORCH_CHECK_VALUE(tensor.dim() == dims, name, " must have ", dims, " dimension(s), not ",
                    tensor.dim());
}

// Addresses cross the border as int64 and mean uint64.
inline const uint64_t* as_addresses(const at::Tensor& contiguous) {
  return reinterpret_cast<const uint64_t*>(contiguous.const_data_ptr<int64_t>());
}

}  // namespace llmdd
