// SPDX-License-Identifier: Apache-2.0
// Copies to, from and within device memory: runs x tensors, as few calls of AscendCL as it allows.
// Torch-free. Nothing here checks addresses: callers have; and the device is the current one.

#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "acl_runtime.h"
#include "block_order.h"
#include "copy_engine.h"
#include "runs.h"

namespace llmdd {

// Most copies that one batch may have.
constexpr size_t kMaxBatch = 4096;

// Where copies go to: all of one kind, in order on one stream of AscendCL.
struct CopyLane {
  CopyKind kind;
  void* stream;
};

// Puts a copy of every run of every tensor pair on the stream. Between host and device they go in
// batches where the runtime has them; within a device one by one, because batches can't do that.
//
// No destination may overlap a source or another destination: a batch has no order. Host memory
// that isn't page-locked is done with on return, as the device can't read it later; other host
// memory must stay as it is until the stream has passed.
//
// AclError: nothing that was put on the stream is still running.
void submit_runs(const TensorPairs& tensors, const Run* runs, size_t count, const CopyLane& lane);

// Puts an order made by order_blocks() on the stream, for every tensor in device memory. `staging`
// is device memory of order.staging_bytes. Errors as above.
void submit_ordered(const uint64_t* bases, size_t num_tensors, const BlockOrder& order,
                    uint64_t staging, void* stream);

// Blocks until everything put on the stream is done.
void wait_for_stream(void* stream);

// Copies like copy_runs(), and blocks until the bytes are there. What was put on a stream can't be
// taken back, so it goes in pieces of some milliseconds, and the deadline is looked at in between.
// Returns the bytes copied; fewer than all mean that the deadline has passed.
int64_t copy_runs_on_lane(const TensorPairs& tensors, const Run* runs, size_t count,
                          const CopyLane& lane, int64_t deadline_ns);

// The copies, in this order, that do what memmove would do with `run` in one tensor, none of which
// overlaps itself: a device may copy a stretch in any order.
std::vector<Run> without_self_overlap(const Run& run);

}  // namespace llmdd
