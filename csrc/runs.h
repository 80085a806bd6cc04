// SPDX-License-Identifier: Apache-2.0
// Runs: which bytes move. Merging of adjacent blocks, and splitting into shares of work.
// Torch-free.

#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace llmdd {

// One stretch of bytes to move, as byte offsets from the bases of a destination and a source
// tensor.
struct Run {
  int64_t dst;
  int64_t src;
  int64_t nbytes;
};

// How blocks lie in the two tensors: block i starts at i * row_stride_bytes, and `nbytes` of it
// move.
struct BlockGeometry {
  int64_t dst_row_stride_bytes;
  int64_t src_row_stride_bytes;
  int64_t nbytes;
};

// Extends `last` by `next` and returns true if `next` follows it without a gap on both sides.
bool extend(Run& last, const Run& next);

// Adds `next` to `runs`, or extends the last run if `next` follows it without a gap on both sides.
void append_merged(std::vector<Run>& runs, const Run& next);

// The runs that copy block src_ids[i] to block dst_ids[i], in the order given.
//
// Throws std::invalid_argument if an id is negative, or if a row_stride_bytes is smaller than the
// block, or if an offset does not fit in 63 bits.
std::vector<Run> merge_blocks(const int64_t* dst_ids, const int64_t* src_ids, size_t count,
                              const BlockGeometry& geometry);

// A part of a list of runs: the runs [first, last), all of them whole.
struct RunSpan {
  size_t first;
  size_t last;
};

// Runs of at most `max_bytes` each, and their grouping into spans of about `max_bytes`: the unit
// that one thread takes at a time, and between two of which a deadline is looked at.
struct WorkShares {
  std::vector<Run> runs;
  std::vector<RunSpan> spans;
};
WorkShares share_runs(const Run* runs, size_t count, int64_t max_bytes);

// Sum of the bytes of all runs. Throws std::invalid_argument if a run has a negative size or
// offset, or if the sum or the end of a run does not fit in 63 bits.
int64_t checked_total(const Run* runs, size_t count);

}  // namespace llmdd
