// SPDX-License-Identifier: Apache-2.0
// How tokens get into the blocks of a cache.
#pragma once

#include "kernel.h"

namespace ascend_sim {

// Writes rows of [token, ...] to the slots of [block, token of the block, ...]; a negative slot is
// padding.
inline void write_slots(const Tensor& rows, const Tensor& cache, const Tensor& slots) {
  TORCH_CHECK(rows.scalar_type() == cache.scalar_type(), "rows of ", rows.scalar_type(),
              " for a cache of ", cache.scalar_type());
  TORCH_CHECK(slots.dim() == 1 && rows.dim() >= 1 && rows.size(0) == slots.size(0), slots.sizes(),
              " slots for rows of shape ", rows.sizes());
  TORCH_CHECK(cache.dim() >= 3 && rows.numel() == rows.size(0) * cache.select(0, 0)[0].numel(),
              "rows of shape ", rows.sizes(), " for a cache of shape ", cache.sizes());
  const Tensor valid = slots.ge(0);
  const Tensor places = cache.flatten(0, 1).flatten(1);
  places.index_copy_(0, slots.masked_select(valid).to(at::kLong), rows.flatten(1).index({valid}));
}

}  // namespace ascend_sim
