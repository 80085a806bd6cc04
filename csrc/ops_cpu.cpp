// SPDX-License-Identifier: Apache-2.0
// The copy ops for tensors in host memory: what the plans ask for, done by the copy engine before
// the return. The dispatcher has released the GIL.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <vector>

#include "copy_engine.h"
#include "copy_plans.h"

namespace llmdd {
namespace {

void copy_between(const TensorRows& dst, const TensorRows& src, const std::vector<Run>& runs) {
  const TensorPairs pairs{dst.bases.data(), src.bases.data(), dst.bases.size()};
  CopyLimits limits;
  limits.max_threads = at::get_num_threads();
  copy_runs(pairs, runs.data(), runs.size(), limits);
}

void copy_blocks(at::TensorList tensors, const at::Tensor& src_ids, const at::Tensor& dst_ids,
                 bool /*non_blocking*/) {
  const BlocksPlan plan = plan_copy_blocks(tensors, src_ids, dst_ids);
  if (plan.nothing) {
    return;
  }
  if (plan.interfere) {
    copy_ordered(plan.all.bases.data(), plan.all.bases.size(), plan.order(), at::get_num_threads());
  } else {
    copy_between(plan.all, plan.all, plan.runs());
  }
  mark_written(tensors);
}

void copy_planned(const RowsPlan& plan, at::TensorList dst) {
  if (!plan.runs.empty()) {
    copy_between(plan.to, plan.from, plan.runs);
    mark_written(dst);
  }
}

void swap_blocks(at::TensorList dst, at::TensorList src, const at::Tensor& dst_ids,
                 const at::Tensor& src_ids, bool /*non_blocking*/) {
  copy_planned(plan_swap_blocks(dst, src, dst_ids, src_ids), dst);
}

void copy_rows(at::TensorList dst, at::TensorList src, int64_t dst_row, int64_t src_row,
               int64_t offset, int64_t nbytes, bool /*non_blocking*/) {
  copy_planned(plan_copy_rows(dst, src, dst_row, src_row, offset, nbytes), dst);
}

TORCH_LIBRARY_IMPL(llm_datadist_torch, CPU, m) {
  m.impl("copy_blocks", copy_blocks);
  m.impl("swap_blocks", swap_blocks);
  m.impl("copy_rows", copy_rows);
}

}  // namespace
}  // namespace llmdd
