// SPDX-License-Identifier: Apache-2.0
// The copy ops for tensors in NPU memory, or of which one list is there and the other in host
// memory. Everything is put on the current stream of the NPU, so it is in order with the caller's
// other work there. The dispatcher has released the GIL.
//
// Which calls do the work (weighed on paper: a launch costs the host some 3 us, and a copy within
// the device goes through its DMA engine, which a gather on the vector cores outruns):
// - host <-> device: one batch for all runs of all tensors (device_copy.h);
// - within the device, few runs: one copy each;
// - within the device, from kIndexFromRuns runs on: a gather and a scatter per tensor, if its
//   blocks lie side by side.
// 2-D copies are not used: block ids are rarely regular, and what is regular merges into runs.

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/index_select.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <torch/library.h>

#include <algorithm>
#include <initializer_list>
#include <vector>

#include "copy_plans.h"
#include "device_copy.h"
#include "npu_work.h"

namespace llmdd {
namespace {

constexpr size_t kIndexFromRuns = 16;
// Memory that a gather may take at a time: KV caches leave little on a device.
constexpr int64_t kGatherBytes = int64_t{32} << 20;

// Waits for the stream, or tells the allocator that it still uses the tensors.
void finish(const NpuWork& work, at::Device device, bool non_blocking,
            std::initializer_list<at::TensorList> lists) {
  if (!non_blocking) {
    wait_for_stream(work.stream());
    return;
  }
  const c10::Stream stream = c10::impl::VirtualGuardImpl(device.type()).getStream(device);
  for (const at::TensorList list : lists) {
    for (const at::Tensor& tensor : list) {
      if (tensor.device() == device) {
        tensor.record_stream(stream);
      }
    }
  }
}

// The dtype that gather and scatter take a tensor for: one of its size that those kernels surely
// know, as only bits are moved; Undefined if there is none.
at::ScalarType moved_as(const at::Tensor& tensor) {
  switch (tensor.element_size()) {
    case 1:
      return at::kChar;
    case 2:
      return tensor.scalar_type() == at::kBFloat16 ? at::kBFloat16 : at::kHalf;
    case 4:
      return at::kInt;
    case 8:
      return at::kLong;
    default:
      return at::ScalarType::Undefined;
  }
}

// Whether gather and scatter can copy blocks of `src` to blocks of `dst`.
bool indexable(at::TensorList dst, at::TensorList src, const TensorRows& to,
               const TensorRows& from) {
  const at::ScalarType type = moved_as(dst.front());
  const auto fits = [type](const at::Tensor& tensor) {
    return moved_as(tensor) == type && tensor.is_contiguous();
  };
  return to.device == from.device && to.nbytes == from.nbytes &&
         type != at::ScalarType::Undefined && std::all_of(dst.begin(), dst.end(), fits) &&
         std::all_of(src.begin(), src.end(), fits);
}

at::Tensor as_rows(const at::Tensor& tensor) {
  return tensor.view(moved_as(tensor)).view({tensor.size(0), -1});
}

// Gathers from `src` and scatters to `dst`, so that within one piece everything is read before
// anything is written.
void copy_by_index(at::TensorList dst, at::TensorList src, const at::Tensor& dst_ids,
                   const at::Tensor& src_ids, int64_t nbytes, int64_t piece_bytes) {
  const at::AutoDispatchBelowADInplaceOrView no_autograd;
  const at::Tensor to = dst_ids.to(dst.front().device());
  const at::Tensor from = src_ids.to(dst.front().device());
  const int64_t step = std::max<int64_t>(piece_bytes / nbytes, 1);
  for (int64_t first = 0; first < to.numel(); first += step) {
    const int64_t last = std::min(first + step, to.numel());
    const at::Tensor to_piece = to.slice(0, first, last);
    const at::Tensor from_piece = from.slice(0, first, last);
    for (size_t t = 0; t < dst.size(); ++t) {
      const at::Tensor gathered = at::index_select(as_rows(src[t]), 0, from_piece);
      as_rows(dst[t]).index_copy_(0, to_piece, gathered);
    }
  }
}

void copy_blocks(at::TensorList tensors, const at::Tensor& src_ids, const at::Tensor& dst_ids,
                 bool non_blocking) {
  const BlocksPlan plan = plan_copy_blocks(tensors, src_ids, dst_ids);
  if (plan.nothing) {
    return;
  }
  const TensorRows& all = plan.all;
  const NpuWork work(all.device);
  const int64_t bytes = plan.dst_ids.numel() * all.nbytes;  // of a tensor
  const std::vector<Run> runs = plan.interfere ? std::vector<Run>() : plan.runs();
  const size_t copies = plan.interfere ? static_cast<size_t>(plan.dst_ids.numel()) : runs.size();
  // Blocks that are both read and written go in one piece, or in order.
  if (copies >= kIndexFromRuns && (!plan.interfere || bytes <= kGatherBytes) &&
      indexable(tensors, tensors, all, all)) {
    copy_by_index(tensors, tensors, plan.dst_ids, plan.src_ids, all.nbytes, kGatherBytes);
  } else if (plan.interfere) {
    const BlockOrder order = plan.order();
    // Goes back to the allocator on return, which gives it to later work of this stream only.
    const at::Tensor staging =
        at::empty({order.staging_bytes}, at::dtype(at::kByte).device(all.device));
    submit_ordered(all.bases.data(), all.bases.size(), order,
                   reinterpret_cast<uint64_t>(staging.mutable_data_ptr()), work.stream());
  } else {
    submit_runs({all.bases.data(), all.bases.data(), all.bases.size()}, runs.data(), runs.size(),
                work.lane(all.device, all.device));
  }
  finish(work, all.device, non_blocking, {tensors});
  mark_written(tensors);
}

void submit_planned(const RowsPlan& plan, const NpuWork& work) {
  submit_runs({plan.to.bases.data(), plan.from.bases.data(), plan.to.bases.size()},
              plan.runs.data(), plan.runs.size(), work.lane(plan.to.device, plan.from.device));
}

void swap_blocks(at::TensorList dst, at::TensorList src, const at::Tensor& dst_ids,
                 const at::Tensor& src_ids, bool non_blocking) {
  const RowsPlan plan = plan_swap_blocks(dst, src, dst_ids, src_ids);
  const at::Device device = npu_of(plan.to.device, plan.from.device);
  if (plan.runs.empty()) {
    return;
  }
  const NpuWork work(device);
  if (plan.runs.size() >= kIndexFromRuns && indexable(dst, src, plan.to, plan.from)) {
    copy_by_index(dst, src, dst_ids, src_ids, plan.to.nbytes, kGatherBytes);
  } else {
    submit_planned(plan, work);
  }
  finish(work, device, non_blocking, {dst, src});
  mark_written(dst);
}

void copy_rows(at::TensorList dst, at::TensorList src, int64_t dst_row, int64_t src_row,
               int64_t offset, int64_t nbytes, bool non_blocking) {
  const RowsPlan plan = plan_copy_rows(dst, src, dst_row, src_row, offset, nbytes);
  const at::Device device = npu_of(plan.to.device, plan.from.device);
  if (plan.runs.empty()) {
    return;
  }
  const NpuWork work(device);
  submit_planned(plan, work);
  finish(work, device, non_blocking, {dst, src});
  mark_written(dst);
}

// PyTorch's name for devices from outside, of which torch_npu makes the NPU.
TORCH_LIBRARY_IMPL(llm_datadist_torch, PrivateUse1, m) {
  m.impl("copy_blocks", copy_blocks);
  m.impl("swap_blocks", swap_blocks);
  m.impl("copy_rows", copy_rows);
}

}  // namespace
}  // namespace llmdd
