// SPDX-License-Identifier: Apache-2.0
// Python face of what the copy ops share: their arguments, checked, as a plan that is then carried
// out in host memory or on a stream. The ops themselves are registered in Python (op_kernels.py).

#include <cstdint>
#include <memory>

#include "bindings.h"
#include "copy_engine.h"
#include "copy_plans.h"
#include "device_copy.h"
#include "tensor_args.h"

namespace llmdd {
namespace {

using Blocks = Held<BlocksPlan>;
using RowCopy = Held<RowsPlan>;

Blocks plan_blocks(TensorRows tensors, const Int64Vector& src_ids, const Int64Vector& dst_ids) {
  return std::make_shared<BlocksPlan>(
      plan_copy_blocks(std::move(tensors), src_ids.values(), dst_ids.values()));
}

RowCopy plan_swap(TensorRows dst, TensorRows src, const Int64Vector& dst_ids,
                  const Int64Vector& src_ids) {
  return std::make_shared<RowsPlan>(
      plan_swap_blocks(std::move(dst), std::move(src), dst_ids.values(), src_ids.values()));
}

RowCopy plan_rows(const TensorRows& dst, const TensorRows& src, int64_t dst_row, int64_t src_row,
                  int64_t offset, int64_t nbytes) {
  return std::make_shared<RowsPlan>(plan_copy_rows(dst, src, dst_row, src_row, offset, nbytes));
}

// ---- in host memory

CopyLimits limits_of(Threads threads) {
  CopyLimits limits;
  limits.max_threads = threads.count;
  return limits;
}

void copy_blocks(const Blocks& plan, Threads threads) {
  const TensorRows& all = plan->all;
  if (plan->nothing) {
    return;
  }
  if (plan->interfere) {
    copy_ordered(all.bases.data(), all.bases.size(), plan->order(), threads.count);
  } else {
    const std::vector<Run> runs = plan->runs();
    copy_runs({all.bases.data(), all.bases.data(), all.bases.size()}, runs.data(), runs.size(),
              limits_of(threads));
  }
}

TensorPairs pairs_of(const RowsPlan& plan) {
  return {plan.to.bases.data(), plan.from.bases.data(), plan.to.bases.size()};
}

void copy_rows(const RowCopy& plan, Threads threads) {
  copy_runs(pairs_of(*plan), plan->runs.data(), plan->runs.size(), limits_of(threads));
}

// ---- on a stream of the device that the thread uses

void* stream_at(uint64_t stream) { return reinterpret_cast<void*>(stream); }

void submit_blocks(const Blocks& plan, uint64_t stream) {
  const TensorRows& all = plan->all;
  const std::vector<Run> runs = plan->runs();
  submit_runs({all.bases.data(), all.bases.data(), all.bases.size()}, runs.data(), runs.size(),
              {CopyKind::kDeviceToDevice, stream_at(stream)});
}

void submit_blocks_in_order(const Blocks& plan, uint64_t staging, uint64_t stream) {
  submit_ordered(plan->all.bases.data(), plan->all.bases.size(), plan->order(), staging,
                 stream_at(stream));
}

CopyKind kind_between(const Place& to, const Place& from) {
  if (to.type == dlpack::kCpu) return CopyKind::kDeviceToHost;
  return from.type == dlpack::kCpu ? CopyKind::kHostToDevice : CopyKind::kDeviceToDevice;
}

void submit_rows(const RowCopy& plan, uint64_t stream) {
  submit_runs(pairs_of(*plan), plan->runs.data(), plan->runs.size(),
              {kind_between(plan->to.place, plan->from.place), stream_at(stream)});
}

// ---- what a kernel chooses its way by

bool blocks_nothing(const Blocks& plan) { return plan->nothing; }
bool blocks_interfere(const Blocks& plan) { return plan->interfere; }
int64_t blocks_nbytes(const Blocks& plan) { return plan->all.nbytes; }
int64_t blocks_staging(const Blocks& plan) { return plan->order().staging_bytes; }
int64_t blocks_copies(const Blocks& plan) {
  return static_cast<int64_t>(plan->interfere ? plan->dst_ids.size() : plan->runs().size());
}
bool rows_nothing(const RowCopy& plan) { return plan->runs.empty(); }
int64_t rows_nbytes(const RowCopy& plan) { return plan->to.nbytes; }
int64_t rows_copies(const RowCopy& plan) { return static_cast<int64_t>(plan->runs.size()); }

}  // namespace

void bind_ops(Module& module) {
  Class<BlocksPlan>("BlocksPlan", "Blocks to copy within each tensor of a list.")
      .constructor<&plan_blocks>({{"tensors"}, {"src_ids"}, {"dst_ids"}})
      .property<&blocks_nothing>("nothing", "No byte is to move.")
      .property<&blocks_interfere>("interfere", "Some block is both read and written.")
      .property<&blocks_nbytes>("nbytes", "Bytes of a block.")
      .property<&blocks_copies>("copies", "Copies per tensor that submit() makes.")
      .property<&blocks_staging>("staging_bytes", "What submit_in_order() needs.")
      .method<&copy_blocks>("copy", {{"threads", 0}}, "Copies in host memory; done on return.")
      .method<&submit_blocks>("submit", {{"stream"}}, "Puts the copies on a stream.")
      .method<&submit_blocks_in_order>(
          "submit_in_order", {{"staging"}, {"stream"}},
          "Likewise where blocks interfere; staging is the address of device memory.")
      .finish(module);
  Class<RowsPlan>("RowsPlan", "Rows to copy from a list of tensors to another one.")
      .static_method<&plan_swap>("of_blocks", {{"dst"}, {"src"}, {"dst_ids"}, {"src_ids"}},
                                 "Block src_ids[i] of src[t] to block dst_ids[i] of dst[t].")
      .static_method<&plan_rows>(
          "of_bytes", {{"dst"}, {"src"}, {"dst_row"}, {"src_row"}, {"offset"}, {"nbytes"}},
          "Bytes [offset, offset + nbytes) of a row of src[t] to those of one of dst[t].")
      .property<&rows_nothing>("nothing", "No byte is to move.")
      .property<&rows_nbytes>("nbytes", "Bytes of a row of dst.")
      .property<&rows_copies>("copies", "Copies per tensor that submit() makes.")
      .method<&copy_rows>("copy", {{"threads", 0}}, "Copies in host memory; done on return.")
      .method<&submit_rows>("submit", {{"stream"}}, "Puts the copies on a stream.")
      .finish(module);
}

}  // namespace llmdd
