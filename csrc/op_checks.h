// SPDX-License-Identifier: Apache-2.0
// What every copy op checks before it moves a byte, whatever the device. Torch-free.

#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "block_order.h"
#include "extents.h"

namespace llmdd {

// Where memory is, as DLPack says it (dlpack.h).
struct Place {
  int32_t type;
  int32_t index;
  bool operator==(const Place& other) const { return type == other.type && index == other.index; }
};

// A list of tensors that are cut alike: equal bytes per row, equal distance between rows.
struct TensorRows {
  std::vector<Rows> tensors;
  std::vector<uint64_t> bases;
  int64_t rows = 0;              // of the shortest tensor
  int64_t row_stride_bytes = 0;  // bytes from one row to the next
  int64_t nbytes = 0;            // bytes of one row
  Place place{1, 0};
};

// Puts a TensorRows together, tensor by tensor. `name` is what messages call the list.
class TensorRowsBuilder {
 public:
  TensorRowsBuilder(const char* name, size_t count);
  // ValueError if the tensor is cut unlike the first.
  void add(const Rows& layout);
  TensorRows finish() { return std::move(all_); }

 private:
  const char* name_;
  TensorRows all_;
  size_t stride_from_ =
      0;  // the tensor whose row_stride_bytes counts: the first of more than one row
};

using Ids = std::vector<int64_t>;

// IndexError that names the first id outside [0, rows).
void check_range(const char* name, const Ids& ids, int64_t rows);

// ValueError unless both have the same length.
void check_same_length(const Ids& dst_ids, const Ids& src_ids);

// The positions of the destinations; ValueError that names both positions of a repeated one.
IdTable table_of_destinations(const char* name, const Ids& dst_ids);

// ValueError if two of the tensors that are written share memory.
void check_no_overlap(const char* name, const TensorRows& tensors);

}  // namespace llmdd
