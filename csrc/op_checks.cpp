// SPDX-License-Identifier: Apache-2.0

#include "op_checks.h"

#include <c10/util/Exception.h>

#include <algorithm>

namespace llmdd {
namespace {

// True if one row (dimension 1 and on) is a dense stretch of memory.
bool row_is_contiguous(const at::Tensor& tensor) {
  int64_t expected = 1;
  for (int64_t d = tensor.dim() - 1; d >= 1; --d) {
    if (tensor.size(d) != 1 && tensor.stride(d) != expected) {
      return false;
    }
    expected *= tensor.size(d);
  }
  return true;
}

Rows layout_of(const char* name, size_t index, const at::Tensor& tensor, at::Device device) {
  TORCH_CHECK_VALUE(tensor.layout() == at::kStrided, name, "[", index, "] has layout ",
                    tensor.layout(), ", only strided tensors can be copied");
  TORCH_CHECK_VALUE(tensor.device() == device, name, "[", index, "] is on ", tensor.device(),
                    ", but ", name, "[0] on ", device, ": one call works on one device");
  TORCH_CHECK_VALUE(
      !tensor.is_quantized() && !tensor.is_conj() && !tensor.is_neg(), name, "[", index,
      "] is quantized, conjugated or negated lazily, so its bytes are not its values");
  TORCH_CHECK_VALUE(tensor.dim() >= 1, name, "[", index,
                    "] has no dimension, dimension 0 must be the row or block");
  Rows layout{};
  layout.rows = tensor.size(0);
  layout.nbytes = static_cast<int64_t>(tensor.element_size());
  for (int64_t d = 1; d < tensor.dim(); ++d) {
    layout.nbytes *= tensor.size(d);
  }
  // A single row may have any stride; it is never used.
  layout.pitch = layout.rows > 1 ? tensor.stride(0) * static_cast<int64_t>(tensor.element_size())
                                 : layout.nbytes;
  if (layout.rows == 0 || layout.nbytes == 0) {
    layout.pitch = layout.nbytes;
    return layout;
  }
  TORCH_CHECK_VALUE(row_is_contiguous(tensor), name, "[", index, "] of shape ", tensor.sizes(),
                    " and strides ", tensor.strides(), " has rows that are not contiguous");
  TORCH_CHECK_VALUE(layout.pitch >= layout.nbytes, name, "[", index, "] has rows of ",
                    layout.nbytes, " bytes only ", layout.pitch, " bytes apart, so they overlap");
  layout.base = reinterpret_cast<uint64_t>(tensor.const_data_ptr());
  TORCH_CHECK_VALUE(layout.base != 0, name, "[", index, "] has no memory (data_ptr() is 0)");
  return layout;
}

}  // namespace

TensorRows rows_of(const char* name, at::TensorList tensors) {
  TensorRows all;
  if (!tensors.empty()) {
    all.device = tensors.front().device();
  }
  all.tensors.reserve(tensors.size());
  all.bases.reserve(tensors.size());
  size_t pitch_from = 0;  // the tensor whose pitch counts: the first of more than one row
  for (size_t i = 0; i < tensors.size(); ++i) {
    const Rows layout = layout_of(name, i, tensors[i], all.device);
    if (i == 0) {
      all.rows = layout.rows;
      all.nbytes = layout.nbytes;
      all.pitch = layout.pitch;
    }
    TORCH_CHECK_VALUE(layout.nbytes == all.nbytes, name, "[", i, "] has rows of ", layout.nbytes,
                      " bytes, but ", name, "[0] of ", all.nbytes);
    if (layout.rows > 1) {
      if (i > 0 && all.tensors[pitch_from].rows <= 1) {
        pitch_from = i;
        all.pitch = layout.pitch;
      }
      TORCH_CHECK_VALUE(layout.pitch == all.pitch, name, "[", i, "] has rows ", layout.pitch,
                        " bytes apart, but ", name, "[", pitch_from, "] ", all.pitch);
    }
    all.rows = std::min(all.rows, layout.rows);
    all.tensors.push_back(layout);
    all.bases.push_back(layout.base);
  }
  return all;
}

at::Tensor checked_ids(const char* name, const at::Tensor& ids) {
  TORCH_CHECK_VALUE(ids.layout() == at::kStrided && ids.is_cpu() &&
                        ids.scalar_type() == at::kLong && ids.dim() == 1,
                    name, " must be a 1-D int64 tensor on the CPU, got shape ", ids.sizes(), " of ",
                    ids.scalar_type(), " on ", ids.device());
  return ids.contiguous();
}

void check_range(const char* name, const at::Tensor& ids, int64_t rows) {
  const int64_t* values = ids.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < ids.numel(); ++i) {
    TORCH_CHECK_INDEX(values[i] >= 0 && values[i] < rows, name, "[", i, "]=", values[i],
                      " is out of range [0, ", rows, ")");
  }
}

void check_same_length(const at::Tensor& dst_ids, const at::Tensor& src_ids) {
  TORCH_CHECK_VALUE(dst_ids.numel() == src_ids.numel(), "dst_ids has ", dst_ids.numel(),
                    " ids, but src_ids ", src_ids.numel());
}

IdTable table_of_destinations(const char* name, const at::Tensor& dst_ids) {
  const int64_t* values = dst_ids.const_data_ptr<int64_t>();
  IdTable table(static_cast<size_t>(dst_ids.numel()));
  for (int64_t i = 0; i < dst_ids.numel(); ++i) {
    const int64_t before = table.insert(values[i], i);
    TORCH_CHECK_VALUE(before == IdTable::kNone, name, "[", i, "]=", values[i], " repeats ", name,
                      "[", before, "]: every block can be written once per call");
  }
  return table;
}

void check_no_overlap(const char* name, const TensorRows& tensors) {
  const auto overlap = find_overlap(tensors.tensors);
  TORCH_CHECK_VALUE(!overlap, name, "[", overlap->first, "] and ", name, "[", overlap->second,
                    "] share memory, so what is written would depend on the order");
}

void mark_written(at::TensorList tensors) {
  for (const at::Tensor& tensor : tensors) {
    if (!tensor.is_inference()) {
      tensor.unsafeGetTensorImpl()->bump_version();
    }
  }
}

}  // namespace llmdd
