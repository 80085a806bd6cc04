// SPDX-License-Identifier: Apache-2.0
// Rotary positions: queries and keys are turned by angles.
#pragma once

#include <ATen/ops/cat.h>
#include <ATen/ops/stack.h>

#include "kernel.h"

namespace ascend_sim {

// How each half (mode 0), or each pair of neighbours (mode 1), of the last dimension turns by 90
// degrees.
inline Tensor rotated(const Tensor& x, int64_t mode) {
  TORCH_CHECK(mode == 0 || mode == 1, "only rotary modes 0 (half) and 1 (interleave), not ", mode);
  if (mode == 0) {
    const auto halves = x.chunk(2, -1);
    return at::cat({halves[1].neg(), halves[0]}, -1);
  }
  const Tensor pairs = x.unflatten(-1, {-1, 2});
  return at::stack({pairs.select(-1, 1).neg(), pairs.select(-1, 0)}, -1).flatten(-2);
}

// The last dimension turned by the angles whose cosines and sines are given.
inline Tensor turned(const Tensor& x, const Tensor& cos, const Tensor& sin, int64_t mode) {
  return x.mul(cos).add(rotated(x, mode).mul(sin));
}

}  // namespace ascend_sim
