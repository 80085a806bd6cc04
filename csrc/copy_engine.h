// SPDX-License-Identifier: Apache-2.0
// Host memory to host memory within one process: runs x tensors, over several threads where the
// size pays for them. Torch-free. Nothing here checks addresses: callers have.

#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "block_order.h"
#include "runs.h"

namespace llmdd {

// The same tensors on both sides of a copy: the runs apply to each pair of bases.
struct TensorPairs {
  const uint64_t* dst_bases;
  const uint64_t* src_bases;
  size_t count;
};

struct CopyLimits {
  int max_threads = 1;      // including the caller's
  int64_t deadline_ns = 0;  // CLOCK_MONOTONIC; 0 = none
};

// Copies every run of every tensor pair and returns the bytes copied. It looks at the deadline
// after every megabyte or so of a thread's work, so a result below the total means that the
// deadline has passed and that some of the runs, in no particular order, are not copied. No byte is
// written after the return.
//
// No destination may overlap a source or another destination, other than by being equal (copied
// onto itself): the result would depend on the order.
int64_t copy_runs(const TensorPairs& tensors, const Run* runs, size_t count,
                  const CopyLimits& limits);

// Executes an order made by order_blocks() in every tensor. Steps of one tensor are done in order
// by one thread.
void copy_ordered(const uint64_t* bases, size_t num_tensors, const BlockOrder& order,
                  int max_threads);

}  // namespace llmdd
