// SPDX-License-Identifier: Apache-2.0

#include "extents.h"

#include <algorithm>
#include <numeric>

namespace llmdd {
namespace {

uint64_t end_of(const Rows& t) {
  return t.base + static_cast<uint64_t>((t.rows - 1) * t.row_stride_bytes) +
         static_cast<uint64_t>(t.nbytes);
}

bool is_empty(const Rows& t) { return t.rows == 0 || t.nbytes == 0; }

// Tensors may lie between each other, so that any that begins before a stretch may hold it.
bool is_inside(const std::vector<uint64_t>& bases, const RowShape& shape, uint64_t start,
               int64_t size) {
  const uint64_t extent = static_cast<uint64_t>(shape.extent);
  const bool dense = shape.row_stride_bytes == shape.nbytes;
  for (auto next = std::upper_bound(bases.begin(), bases.end(), start); next != bases.begin();) {
    const uint64_t offset = start - *--next;
    if (offset >= extent) {
      return false;
    }
    const int64_t at = static_cast<int64_t>(offset);
    const int64_t room = dense ? shape.extent - at : shape.nbytes - at % shape.row_stride_bytes;
    if (size <= room) {
      return true;
    }
  }
  return false;
}

}  // namespace

bool disjoint(const Rows& a, const Rows& b) {
  if (is_empty(a) || is_empty(b) || end_of(a) <= b.base || end_of(b) <= a.base) {
    return true;
  }
  if (a.row_stride_bytes != b.row_stride_bytes) {
    return false;
  }
  // Both repeat every `row_stride_bytes` bytes: look at one period, from a row of `a` on.
  const uint64_t row_stride_bytes = static_cast<uint64_t>(a.row_stride_bytes);
  const uint64_t ahead = b.base >= a.base
                             ? (b.base - a.base) % row_stride_bytes
                             : row_stride_bytes - 1 - (a.base - b.base - 1) % row_stride_bytes;
  return ahead >= static_cast<uint64_t>(a.nbytes) &&
         row_stride_bytes - ahead >= static_cast<uint64_t>(b.nbytes);
}

std::optional<std::pair<size_t, size_t>> find_overlap(const std::vector<Rows>& tensors) {
  std::vector<size_t> order(tensors.size());
  std::iota(order.begin(), order.end(), size_t{0});
  std::sort(order.begin(), order.end(),
            [&](size_t a, size_t b) { return tensors[a].base < tensors[b].base; });
  for (size_t i = 0; i < order.size(); ++i) {
    const Rows& a = tensors[order[i]];
    if (is_empty(a)) {
      continue;
    }
    for (size_t j = i + 1; j < order.size() && tensors[order[j]].base < end_of(a); ++j) {
      if (!disjoint(a, tensors[order[j]])) {
        return std::make_pair(std::min(order[i], order[j]), std::max(order[i], order[j]));
      }
    }
  }
  return std::nullopt;
}

std::optional<std::pair<size_t, size_t>> find_block_overlap(const Rows& dst, const int64_t* dst_ids,
                                                            const Rows& src, const int64_t* src_ids,
                                                            size_t count) {
  std::vector<std::pair<uint64_t, size_t>> starts;
  starts.reserve(count);
  for (size_t i = 0; i < count; ++i) {
    starts.emplace_back(dst.base + static_cast<uint64_t>(dst_ids[i] * dst.row_stride_bytes), i);
  }
  std::sort(starts.begin(), starts.end());
  const uint64_t dst_bytes = static_cast<uint64_t>(dst.nbytes);
  for (size_t i = 0; i < count; ++i) {
    const uint64_t first = src.base + static_cast<uint64_t>(src_ids[i] * src.row_stride_bytes);
    // The first destination that ends after our start shares a byte with us if it starts before our
    // end.
    const auto hit = std::partition_point(starts.begin(), starts.end(), [&](const auto& start) {
      return start.first + dst_bytes <= first;
    });
    if (hit != starts.end() && hit->first < first + static_cast<uint64_t>(src.nbytes)) {
      return std::make_pair(hit->second, i);
    }
  }
  return std::nullopt;
}

std::optional<int64_t> bytes_inside(const std::vector<uint64_t>& bases, const RowShape& shape,
                                    const uint64_t* starts, const int64_t* sizes, size_t count) {
  int64_t total = 0;
  for (size_t i = 0; i < count; ++i) {
    if (sizes[i] <= 0 || !is_inside(bases, shape, starts[i], sizes[i])) {
      return std::nullopt;
    }
    if (__builtin_add_overflow(total, sizes[i], &total)) {
      total = INT64_MAX;
    }
  }
  return total;
}

}  // namespace llmdd
