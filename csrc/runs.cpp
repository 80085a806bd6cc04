// SPDX-License-Identifier: Apache-2.0

#include "runs.h"

#include <algorithm>
#include <limits>
#include <stdexcept>
#include <string>

namespace llmdd {
namespace {

constexpr int64_t kMax = std::numeric_limits<int64_t>::max();

void check_geometry(const BlockGeometry& g) {
  if (g.nbytes <= 0) {
    throw std::invalid_argument("nbytes=" + std::to_string(g.nbytes) + " must be positive");
  }
  for (int64_t row_stride_bytes : {g.dst_row_stride_bytes, g.src_row_stride_bytes}) {
    if (row_stride_bytes < g.nbytes) {
      throw std::invalid_argument("row_stride_bytes " + std::to_string(row_stride_bytes) +
                                  " is smaller than the block of " + std::to_string(g.nbytes) +
                                  " bytes");
    }
  }
}

void check_ids(const char* name, const int64_t* ids, size_t count, int64_t row_stride_bytes,
               int64_t nbytes) {
  const int64_t limit = (kMax - nbytes) / row_stride_bytes;
  for (size_t i = 0; i < count; ++i) {
    if (ids[i] < 0 || ids[i] > limit) {
      throw std::invalid_argument(std::string(name) + "[" + std::to_string(i) +
                                  "]=" + std::to_string(ids[i]) + " is out of range [0, " +
                                  std::to_string(limit) + "]");
    }
  }
}

}  // namespace

bool extend(Run& last, const Run& next) {
  if (last.dst + last.nbytes != next.dst || last.src + last.nbytes != next.src) {
    return false;
  }
  last.nbytes += next.nbytes;
  return true;
}

void append_merged(std::vector<Run>& runs, const Run& next) {
  if (runs.empty() || !extend(runs.back(), next)) {
    runs.push_back(next);
  }
}

std::vector<Run> merge_blocks(const int64_t* dst_ids, const int64_t* src_ids, size_t count,
                              const BlockGeometry& geometry) {
  check_geometry(geometry);
  check_ids("dst_ids", dst_ids, count, geometry.dst_row_stride_bytes, geometry.nbytes);
  check_ids("src_ids", src_ids, count, geometry.src_row_stride_bytes, geometry.nbytes);
  std::vector<Run> runs;
  runs.reserve(count);
  for (size_t i = 0; i < count; ++i) {
    append_merged(runs, {dst_ids[i] * geometry.dst_row_stride_bytes,
                         src_ids[i] * geometry.src_row_stride_bytes, geometry.nbytes});
  }
  return runs;
}

WorkShares share_runs(const Run* runs, size_t count, int64_t max_bytes) {
  WorkShares shares;
  shares.runs.reserve(count);
  size_t first = 0;
  int64_t in_span = 0;
  for (size_t i = 0; i < count; ++i) {
    for (int64_t done = 0; done < runs[i].nbytes;) {
      const int64_t piece = std::min(runs[i].nbytes - done, max_bytes);
      if (in_span > 0 && in_span + piece > max_bytes) {
        shares.spans.push_back({first, shares.runs.size()});
        first = shares.runs.size();
        in_span = 0;
      }
      shares.runs.push_back({runs[i].dst + done, runs[i].src + done, piece});
      in_span += piece;
      done += piece;
    }
  }
  if (in_span > 0) {
    shares.spans.push_back({first, shares.runs.size()});
  }
  return shares;
}

int64_t checked_total(const Run* runs, size_t count) {
  int64_t total = 0;
  for (size_t i = 0; i < count; ++i) {
    const Run& run = runs[i];
    if (run.dst < 0 || run.src < 0 || run.nbytes < 0) {
      throw std::invalid_argument("runs[" + std::to_string(i) + "]=(" + std::to_string(run.dst) +
                                  ", " + std::to_string(run.src) + ", " +
                                  std::to_string(run.nbytes) + ") has a negative offset or size");
    }
    if (run.nbytes > kMax - total || run.dst > kMax - run.nbytes || run.src > kMax - run.nbytes) {
      throw std::invalid_argument("runs[" + std::to_string(i) +
                                  "] makes the bytes to move exceed 2**63");
    }
    total += run.nbytes;
  }
  return total;
}

}  // namespace llmdd
