// SPDX-License-Identifier: Apache-2.0
// What every copy op checks before it moves a byte, whatever the device.

#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <vector>

#include "block_order.h"
#include "extents.h"

namespace llmdd {

// A list of tensors that are cut alike: equal bytes per row, equal distance between rows.
struct TensorRows {
  std::vector<Rows> tensors;
  std::vector<uint64_t> bases;
  int64_t rows = 0;    // of the shortest tensor
  int64_t pitch = 0;   // bytes from one row to the next
  int64_t nbytes = 0;  // bytes of one row
  at::Device device = at::kCPU;
};

// Reads the layout of `tensors`, which messages call `name`. ValueError if a tensor is on another
// device than the first, is not strided, has no dimension, has rows that are not contiguous or that
// overlap, or is cut unlike the first.
TensorRows rows_of(const char* name, at::TensorList tensors);

// Block ids as their raw values, made contiguous if they aren't. ValueError unless a 1-D int64 CPU
// tensor.
at::Tensor checked_ids(const char* name, const at::Tensor& ids);

// IndexError that names the first id outside [0, rows).
void check_range(const char* name, const at::Tensor& ids, int64_t rows);

// ValueError unless both have the same length.
void check_same_length(const at::Tensor& dst_ids, const at::Tensor& src_ids);

// The positions of the destinations; ValueError that names both positions of a repeated one.
IdTable table_of_destinations(const char* name, const at::Tensor& dst_ids);

// ValueError if two of the tensors that are written share memory.
void check_no_overlap(const char* name, const TensorRows& tensors);

// Tells autograd that `tensors` were written.
void mark_written(at::TensorList tensors);

}  // namespace llmdd
