// SPDX-License-Identifier: Apache-2.0
// Which keys a query may not see, by the modes that all fused attention kernels number alike.
#pragma once

#include <ATen/ops/ones.h>

#include "kernel.h"

namespace ascend_sim {

// How many tokens before, and behind the query's own a band lets it see.
struct Band {
  int64_t left;
  int64_t right;
};

// True where a query must not see a key. Modes: 0 and 1 `given` as it is (undefined: all is seen),
// 2 and 3 causal from the first and from the last token, 4 a band from the last token.
inline Tensor hidden_keys(int64_t mode, const Tensor& given, Band band, int64_t queries,
                          int64_t keys) {
  const auto all = [&] { return at::ones({queries, keys}, at::kBool); };
  const int64_t shift = keys - queries;
  switch (mode) {
    case 0:
    case 1:
      return given.defined() ? given.to(at::kBool) : Tensor();
    case 2:
      return all().triu(1);
    case 3:
      return all().triu(1 + shift);
    case 4:
      return all().triu(1 + shift + band.right).logical_or(all().tril(-1 + shift - band.left));
    default:
      TORCH_CHECK(false, "only the sparse modes 0 to 4, not ", mode);
      return {};
  }
}

}  // namespace ascend_sim
