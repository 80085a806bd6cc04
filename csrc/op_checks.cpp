// SPDX-License-Identifier: Apache-2.0

#include "op_checks.h"

#include <algorithm>

#include "errors.h"

namespace llmdd {

TensorRowsBuilder::TensorRowsBuilder(const char* name, size_t count) : name_(name) {
  all_.tensors.reserve(count);
  all_.bases.reserve(count);
}

void TensorRowsBuilder::add(const Rows& layout) {
  const size_t index = all_.tensors.size();
  if (index == 0) {
    all_.rows = layout.rows;
    all_.nbytes = layout.nbytes;
    all_.row_stride_bytes = layout.row_stride_bytes;
  }
  check_value(layout.nbytes == all_.nbytes, name_, "[", index, "] has rows of ", layout.nbytes,
              " bytes, but ", name_, "[0] of ", all_.nbytes);
  if (layout.rows > 1) {
    if (index > 0 && all_.tensors[stride_from_].rows <= 1) {
      stride_from_ = index;
      all_.row_stride_bytes = layout.row_stride_bytes;
    }
    check_value(layout.row_stride_bytes == all_.row_stride_bytes, name_, "[", index, "] has rows ",
                layout.row_stride_bytes, " bytes apart, but ", name_, "[", stride_from_, "] ",
                all_.row_stride_bytes);
  }
  all_.rows = std::min(all_.rows, layout.rows);
  all_.tensors.push_back(layout);
  all_.bases.push_back(layout.base);
}

void check_range(const char* name, const Ids& ids, int64_t rows) {
  for (size_t i = 0; i < ids.size(); ++i) {
    check_index(ids[i] >= 0 && ids[i] < rows, name, "[", i, "]=", ids[i], " is out of range [0, ",
                rows, ")");
  }
}

void check_same_length(const Ids& dst_ids, const Ids& src_ids) {
  check_value(dst_ids.size() == src_ids.size(), "dst_ids has ", dst_ids.size(),
              " ids, but src_ids ", src_ids.size());
}

IdTable table_of_destinations(const char* name, const Ids& dst_ids) {
  IdTable table(dst_ids.size());
  for (size_t i = 0; i < dst_ids.size(); ++i) {
    const int64_t before = table.insert(dst_ids[i], static_cast<int64_t>(i));
    check_value(before == IdTable::kNone, name, "[", i, "]=", dst_ids[i], " repeats ", name, "[",
                before, "]: every block can be written once per call");
  }
  return table;
}

void check_no_overlap(const char* name, const TensorRows& tensors) {
  const auto overlap = find_overlap(tensors.tensors);
  if (overlap) {
    throw std::invalid_argument(
        text_of(name, "[", overlap->first, "] and ", name, "[", overlap->second,
                "] share memory, so what is written would depend on the order"));
  }
}

}  // namespace llmdd
