// SPDX-License-Identifier: Apache-2.0

#include "copy_plans.h"

#include <algorithm>
#include <utility>

#include "errors.h"

namespace llmdd {
namespace {

void check_same_count(const TensorRows& dst, const TensorRows& src) {
  check_value(dst.bases.size() == src.bases.size(), "dst has ", dst.bases.size(),
              " tensors, but src ", src.bases.size());
}

// Refuses destinations that share memory with a source: what is copied would depend on the order.
void check_blocks_apart(const TensorRows& dst, const TensorRows& src, const Ids& dst_ids,
                        const Ids& src_ids) {
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
      const auto hit = find_block_overlap(dst.tensors[d], dst_ids.data(), src.tensors[s],
                                          src_ids.data(), dst_ids.size());
      if (hit) {
        throw std::invalid_argument(text_of("dst_ids[", hit->first, "] of dst[", d,
                                            "] and src_ids[", hit->second, "] of src[", s,
                                            "] share memory; copy_blocks copies within a tensor"));
      }
    }
  }
}

void check_segment(const char* name, const TensorRows& tensors, int64_t row, int64_t offset,
                   int64_t nbytes) {
  check_index(row >= 0 && row < tensors.rows, name, "_row=", row, " is out of range [0, ",
              tensors.rows, ")");
  check_value(offset >= 0 && nbytes >= 0, "offset=", offset, " and nbytes=", nbytes,
              " must not be negative");
  check_value(offset <= tensors.nbytes && nbytes <= tensors.nbytes - offset, "offset=", offset,
              " and nbytes=", nbytes, " exceed the rows of ", name, ", which have ", tensors.nbytes,
              " bytes");
}

// The bytes of row `row` from `offset` on, in each tensor.
std::vector<Rows> segments(const TensorRows& tensors, int64_t row, int64_t offset, int64_t nbytes) {
  std::vector<Rows> result;
  result.reserve(tensors.bases.size());
  for (uint64_t base : tensors.bases) {
    result.push_back(
        {base + static_cast<uint64_t>(row * tensors.row_stride_bytes + offset), 1, nbytes, nbytes});
  }
  return result;
}

}  // namespace

std::vector<Run> BlocksPlan::runs() const {
  std::vector<Run> runs = merge_blocks(dst_ids.data(), src_ids.data(), dst_ids.size(),
                                       {all.row_stride_bytes, all.row_stride_bytes, all.nbytes});
  runs.erase(
      std::remove_if(runs.begin(), runs.end(), [](const Run& run) { return run.dst == run.src; }),
      runs.end());
  return runs;
}

BlockOrder BlocksPlan::order() const {
  return order_blocks(dst_ids.data(), src_ids.data(), dst_ids.size(), table, all.row_stride_bytes,
                      all.nbytes);
}

BlocksPlan plan_copy_blocks(TensorRows tensors, Ids src_ids, Ids dst_ids) {
  check_same_length(dst_ids, src_ids);
  if (!tensors.bases.empty()) {
    check_range("src_ids", src_ids, tensors.rows);
    check_range("dst_ids", dst_ids, tensors.rows);
  }
  IdTable table = table_of_destinations("dst_ids", dst_ids);
  check_no_overlap("tensors", tensors);
  const bool nothing = tensors.bases.empty() || dst_ids.empty() || tensors.nbytes == 0;
  const bool interfere =
      !nothing && pairs_interfere(dst_ids.data(), src_ids.data(), dst_ids.size(), table);
  return {std::move(tensors), std::move(dst_ids), std::move(src_ids), std::move(table), nothing,
          interfere};
}

RowsPlan plan_swap_blocks(TensorRows dst, TensorRows src, const Ids& dst_ids, const Ids& src_ids) {
  RowsPlan plan{std::move(dst), std::move(src), {}};
  const TensorRows& to = plan.to;
  const TensorRows& from = plan.from;
  check_same_count(to, from);
  check_same_length(dst_ids, src_ids);
  if (!to.bases.empty()) {
    check_value(to.nbytes == from.nbytes, "dst has rows of ", to.nbytes, " bytes, but src of ",
                from.nbytes);
    check_range("src_ids", src_ids, from.rows);
    check_range("dst_ids", dst_ids, to.rows);
  }
  (void)table_of_destinations("dst_ids", dst_ids);
  check_no_overlap("dst", to);
  if (to.place == from.place) {
    check_blocks_apart(to, from, dst_ids, src_ids);
  }
  if (!to.bases.empty() && !dst_ids.empty() && to.nbytes > 0) {
    plan.runs = merge_blocks(dst_ids.data(), src_ids.data(), dst_ids.size(),
                             {to.row_stride_bytes, from.row_stride_bytes, to.nbytes});
  }
  return plan;
}

RowsPlan plan_copy_rows(const TensorRows& to, const TensorRows& from, int64_t dst_row,
                        int64_t src_row, int64_t offset, int64_t nbytes) {
  check_same_count(to, from);
  RowsPlan plan;
  plan.to.place = to.place;
  plan.from.place = from.place;
  if (to.bases.empty()) {
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
  const bool same_memory = to.place == from.place;
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
      check_value(disjoint(written.tensors[d], plan.from.tensors[s]), "row ", dst_row, " of dst[",
                  d, "] and row ", src_row, " of a source tensor share memory in part");
    }
  }
  plan.runs = {{0, 0, nbytes}};
  return plan;
}

}  // namespace llmdd
