// SPDX-License-Identifier: Apache-2.0
// The copy ops for tensors in host memory: check everything, then hand addresses to the copy
// engine. The dispatcher has released the GIL.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

#include "copy_engine.h"
#include "op_checks.h"

namespace llmdd {
namespace {

void copy_between(const TensorRows& dst, const TensorRows& src, const std::vector<Run>& runs) {
  const TensorPairs pairs{dst.bases.data(), src.bases.data(), dst.bases.size()};
  CopyLimits limits;
  limits.max_threads = at::get_num_threads();
  copy_runs(pairs, runs.data(), runs.size(), limits);
}

void check_same_count(const TensorRows& dst, const TensorRows& src) {
  TORCH_CHECK_VALUE(dst.bases.size() == src.bases.size(), "dst has ", dst.bases.size(),
                    " tensors, but src ", src.bases.size());
}

void copy_blocks(at::TensorList tensors, const at::Tensor& src_ids, const at::Tensor& dst_ids) {
  const TensorRows all = rows_of("tensors", tensors, at::kCPU);
  const at::Tensor src = checked_ids("src_ids", src_ids);
  const at::Tensor dst = checked_ids("dst_ids", dst_ids);
  check_same_length(dst, src);
  if (!tensors.empty()) {
    check_range("src_ids", src, all.rows);
    check_range("dst_ids", dst, all.rows);
  }
  const IdTable table = table_of_destinations("dst_ids", dst);
  check_no_overlap("tensors", all);
  const size_t count = static_cast<size_t>(dst.numel());
  if (tensors.empty() || count == 0 || all.nbytes == 0) {
    return;
  }
  const int64_t* dst_values = dst.const_data_ptr<int64_t>();
  const int64_t* src_values = src.const_data_ptr<int64_t>();
  if (pairs_interfere(dst_values, src_values, count, table)) {
    const BlockOrder order =
        order_blocks(dst_values, src_values, count, table, all.pitch, all.nbytes);
    copy_ordered(all.bases.data(), all.bases.size(), order, at::get_num_threads());
  } else {
    std::vector<Run> runs =
        merge_blocks(dst_values, src_values, count, {all.pitch, all.pitch, all.nbytes});
    runs.erase(
        std::remove_if(runs.begin(), runs.end(), [](const Run& run) { return run.dst == run.src; }),
        runs.end());
    copy_between(all, all, runs);
  }
  mark_written(tensors);
}

// Refuses destinations that share memory with a source: what is copied would depend on the order.
void check_blocks_apart(const TensorRows& dst, const TensorRows& src, const at::Tensor& dst_ids,
                        const at::Tensor& src_ids) {
  std::vector<Rows> both(dst.tensors);
  both.insert(both.end(), src.tensors.begin(), src.tensors.end());
  if (!find_overlap(both)) {
    return;  // the usual case
  }
  for (size_t d = 0; d < dst.tensors.size(); ++d) {
    for (size_t s = 0; s < src.tensors.size(); ++s) {
      if (disjoint(dst.tensors[d], src.tensors[s])) {
        continue;
      }
      const auto hit = find_block_overlap(dst.tensors[d], dst_ids.const_data_ptr<int64_t>(),
                                          src.tensors[s], src_ids.const_data_ptr<int64_t>(),
                                          static_cast<size_t>(dst_ids.numel()));
      TORCH_CHECK_VALUE(!hit, "dst_ids[", hit->first, "] of dst[", d, "] and src_ids[", hit->second,
                        "] of src[", s, "] share memory; copy_blocks copies within a tensor");
    }
  }
}

void swap_blocks(at::TensorList dst, at::TensorList src, const at::Tensor& dst_ids,
                 const at::Tensor& src_ids) {
  const TensorRows to = rows_of("dst", dst, at::kCPU);
  const TensorRows from = rows_of("src", src, at::kCPU);
  check_same_count(to, from);
  const at::Tensor to_ids = checked_ids("dst_ids", dst_ids);
  const at::Tensor from_ids = checked_ids("src_ids", src_ids);
  check_same_length(to_ids, from_ids);
  if (!dst.empty()) {
    TORCH_CHECK_VALUE(to.nbytes == from.nbytes, "dst has rows of ", to.nbytes,
                      " bytes, but src of ", from.nbytes);
    check_range("src_ids", from_ids, from.rows);
    check_range("dst_ids", to_ids, to.rows);
  }
  (void)table_of_destinations("dst_ids", to_ids);
  check_no_overlap("dst", to);
  check_blocks_apart(to, from, to_ids, from_ids);
  if (dst.empty() || to_ids.numel() == 0 || to.nbytes == 0) {
    return;
  }
  copy_between(
      to, from,
      merge_blocks(to_ids.const_data_ptr<int64_t>(), from_ids.const_data_ptr<int64_t>(),
                   static_cast<size_t>(to_ids.numel()), {to.pitch, from.pitch, to.nbytes}));
  mark_written(dst);
}

void check_segment(const char* name, const TensorRows& tensors, int64_t row, int64_t offset,
                   int64_t nbytes) {
  TORCH_CHECK_INDEX(row >= 0 && row < tensors.rows, name, "_row=", row, " is out of range [0, ",
                    tensors.rows, ")");
  TORCH_CHECK_VALUE(offset >= 0 && nbytes >= 0, "offset=", offset, " and nbytes=", nbytes,
                    " must not be negative");
  TORCH_CHECK_VALUE(offset <= tensors.nbytes && nbytes <= tensors.nbytes - offset,
                    "offset=", offset, " and nbytes=", nbytes, " exceed the rows of ", name,
                    ", which have ", tensors.nbytes, " bytes");
}

// The bytes of row `row` from `offset` on, in each tensor.
std::vector<Rows> segments(const TensorRows& tensors, int64_t row, int64_t offset, int64_t nbytes) {
  std::vector<Rows> result;
  result.reserve(tensors.bases.size());
  for (uint64_t base : tensors.bases) {
    result.push_back(
        {base + static_cast<uint64_t>(row * tensors.pitch + offset), 1, nbytes, nbytes});
  }
  return result;
}

void copy_rows(at::TensorList dst, at::TensorList src, int64_t dst_row, int64_t src_row,
               int64_t offset, int64_t nbytes) {
  const TensorRows to = rows_of("dst", dst, at::kCPU);
  const TensorRows from = rows_of("src", src, at::kCPU);
  check_same_count(to, from);
  if (dst.empty()) {
    return;
  }
  check_segment("src", from, src_row, offset, nbytes);
  check_segment("dst", to, dst_row, offset, nbytes);
  if (nbytes == 0) {
    return;
  }
  std::vector<Rows> all = segments(to, dst_row, offset, nbytes);
  TensorRows written;
  written.tensors = all;
  check_no_overlap("dst", written);
  TensorRows moved_to;
  TensorRows moved_from;
  const std::vector<Rows> sources = segments(from, src_row, offset, nbytes);
  for (size_t i = 0; i < sources.size(); ++i) {
    if (sources[i].base != all[i].base) {  // a row copied onto itself stays as it is
      moved_to.bases.push_back(all[i].base);
      moved_from.bases.push_back(sources[i].base);
      moved_from.tensors.push_back(sources[i]);
    }
  }
  for (size_t s = 0; s < moved_from.tensors.size(); ++s) {
    for (size_t d = 0; d < written.tensors.size(); ++d) {
      TORCH_CHECK_VALUE(disjoint(written.tensors[d], moved_from.tensors[s]), "row ", dst_row,
                        " of dst[", d, "] and row ", src_row,
                        " of a source tensor share memory in part");
    }
  }
  copy_between(moved_to, moved_from, {{0, 0, nbytes}});
  mark_written(dst);
}

TORCH_LIBRARY_IMPL(llm_datadist_torch, CPU, m) {
  m.impl("copy_blocks", copy_blocks);
  m.impl("swap_blocks", swap_blocks);
  m.impl("copy_rows", copy_rows);
}

}  // namespace
}  // namespace llmdd
