// SPDX-License-Identifier: Apache-2.0

#include "copy_plans.h"

#include <c10/util/Exception.h>

#include <algorithm>
#include <utility>

namespace llmdd {
namespace {

void check_same_count(const TensorRows& dst, const TensorRows& src) {
  TORCH_CHECK_VALUE(dst.bases.size() == src.bases.size(), "dst has ", dst.bases.size(),
                    " tensors, but src ", src.bases.size());
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

}  // namespace

std::vector<Run> BlocksPlan::runs() const {
  std::vector<Run> runs =
      merge_blocks(dst_ids.const_data_ptr<int64_t>(), src_ids.const_data_ptr<int64_t>(),
                   static_cast<size_t>(dst_ids.numel()), {all.pitch, all.pitch, all.nbytes});
  runs.erase(
      std::remove_if(runs.begin(), runs.end(), [](const Run& run) { return run.dst == run.src; }),
      runs.end());
  return runs;
}

BlockOrder BlocksPlan::order() const {
  return order_blocks(dst_ids.const_data_ptr<int64_t>(), src_ids.const_data_ptr<int64_t>(),
                      static_cast<size_t>(dst_ids.numel()), table, all.pitch, all.nbytes);
}

BlocksPlan plan_copy_blocks(at::TensorList tensors, const at::Tensor& src_ids,
                            const at::Tensor& dst_ids) {
  TensorRows all = rows_of("tensors", tensors);
  at::Tensor src = checked_ids("src_ids", src_ids);
  at::Tensor dst = checked_ids("dst_ids", dst_ids);
  check_same_length(dst, src);
  if (!tensors.empty()) {
    check_range("src_ids", src, all.rows);
    check_range("dst_ids", dst, all.rows);
  }
  IdTable table = table_of_destinations("dst_ids", dst);
  check_no_overlap("tensors", all);
  const bool nothing = tensors.empty() || dst.numel() == 0 || all.nbytes == 0;
  const bool interfere =
      !nothing && pairs_interfere(dst.const_data_ptr<int64_t>(), src.const_data_ptr<int64_t>(),
                                  static_cast<size_t>(dst.numel()), table);
  return {std::move(all), std::move(dst), std::move(src), std::move(table), nothing, interfere};
}

RowsPlan plan_swap_blocks(at::TensorList dst, at::TensorList src, const at::Tensor& dst_ids,
                          const at::Tensor& src_ids) {
  RowsPlan plan{rows_of("dst", dst), rows_of("src", src), {}};
  const TensorRows& to = plan.to;
  const TensorRows& from = plan.from;
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
  if (to.device == from.device) {
    check_blocks_apart(to, from, to_ids, from_ids);
  }
  if (!dst.empty() && to_ids.numel() > 0 && to.nbytes > 0) {
    plan.runs =
        merge_blocks(to_ids.const_data_ptr<int64_t>(), from_ids.const_data_ptr<int64_t>(),
                     static_cast<size_t>(to_ids.numel()), {to.pitch, from.pitch, to.nbytes});
  }
  return plan;
}

RowsPlan plan_copy_rows(at::TensorList dst, at::TensorList src, int64_t dst_row, int64_t src_row,
                        int64_t offset, int64_t nbytes) {
  const TensorRows to = rows_of("dst", dst);
  const TensorRows from = rows_of("src", src);
  check_same_count(to, from);
  RowsPlan plan;
  plan.to.device = to.device;
  plan.from.device = from.device;
  if (dst.empty()) {
    return plan;
  }
  check_segment("src", from, src_row, offset, nbytes);
  check_segment("dst", to, dst_row, offset, nbytes);
  if (nbytes == 0) {
    return plan;
  }
  TensorRows written;
  written.tensors = segments(to, dst_row, offset, nbytes);
  check_no_overlap("dst", written);
  const bool same_memory = to.device == from.device;
  const std::vector<Rows> sources = segments(from, src_row, offset, nbytes);
  for (size_t i = 0; i < sources.size(); ++i) {
    if (!same_memory || sources[i].base != written.tensors[i].base) {
      plan.to.bases.push_back(written.tensors[i].base);
      plan.from.bases.push_back(sources[i].base);
      plan.from.tensors.push_back(sources[i]);
    }  // a row copied onto itself stays as it is
  }
  for (size_t s = 0; same_memory && s < plan.from.tensors.size(); ++s) {
    for (size_t d = 0; d < written.tensors.size(); ++d) {
      TORCH_CHECK_VALUE(disjoint(written.tensors[d], plan.from.tensors[s]), "row ", dst_row,
                        " of dst[", d, "] and row ", src_row,
                        " of a source tensor share memory in part");
    }
  }
  plan.runs = {{0, 0, nbytes}};
  return plan;
}

}  // namespace llmdd
