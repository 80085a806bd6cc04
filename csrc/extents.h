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

// The bytes of a tensor: `rows` stretches of `nbytes`, whose starts are `row_stride_bytes` apart.
struct Rows {
  uint64_t base;
  int64_t rows;
  int64_t row_stride_bytes;
  int64_t nbytes;
};

// True if the two share no byte. For different row strides the answer may be a pessimistic false.
bool disjoint(const Rows& a, const Rows& b);

// Positions of two entries that share memory, or nothing.
std::optional<std::pair<size_t, size_t>> find_overlap(const std::vector<Rows>& tensors);

// Positions (in dst_ids, in src_ids) of a block of `dst` and one of `src` that share memory, or
// nothing.
std::optional<std::pair<size_t, size_t>> find_block_overlap(const Rows& dst, const int64_t* dst_ids,
                                                            const Rows& src, const int64_t* src_ids,
                                                            size_t count);

// How the rows of all tensors of a cache lie: from the first byte of a tensor to its last, and the
// rows in between.
struct RowShape {
  int64_t extent;
  int64_t row_stride_bytes;
  int64_t nbytes;
};

// The bytes of all stretches (starts[i], sizes[i]), or nothing unless each has some and lies inside
// a row of a tensor; where rows follow each other without gaps, inside a tensor. `bases` are
// sorted.
std::optional<int64_t> bytes_inside(const std::vector<uint64_t>& bases, const RowShape& shape,
                                    const uint64_t* starts, const int64_t* sizes, size_t count);

}  // namespace llmdd
