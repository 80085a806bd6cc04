// SPDX-License-Identifier: Apache-2.0
// Do tensors share memory? Exact for interleaved views: the K and V halves of one tensor don't,
// although the one's first byte to its last spans the other. Torch-free.

#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <utility>
#include <vector>

namespace llmdd {

// The bytes of a tensor: `rows` stretches of `nbytes`, whose starts are `pitch` apart.
struct Rows {
  uint64_t base;
  int64_t rows;
  int64_t pitch;
  int64_t nbytes;
};

// True if the two share no byte. For different pitches the answer may be a pessimistic false.
bool disjoint(const Rows& a, const Rows& b);

// Positions of two entries that share memory, or nothing.
std::optional<std::pair<size_t, size_t>> find_overlap(const std::vector<Rows>& tensors);

// Positions (in dst_ids, in src_ids) of a block of `dst` and one of `src` that share memory, or
// nothing.
std::optional<std::pair<size_t, size_t>> find_block_overlap(const Rows& dst, const int64_t* dst_ids,
                                                            const Rows& src, const int64_t* src_ids,
                                                            size_t count);

}  // namespace llmdd
