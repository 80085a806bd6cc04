// SPDX-License-Identifier: Apache-2.0

#include "mapped_copy.h"

#include <algorithm>
#include <vector>

namespace llmdd {
namespace {

// The end of the last remote byte, counted from a tensor's base.
uint64_t remote_extent(const RemoteCopy& copy) {
  uint64_t end = 0;
  for (size_t i = 0; i < copy.num_runs; ++i) {
    const int64_t* run = copy.runs + 3 * i;
    end = std::max(end, static_cast<uint64_t>(run[1]) + static_cast<uint64_t>(run[2]));
  }
  return end;
}

// The remote bases as addresses in the mapping; empty if a tensor leaves the region.
std::vector<uint64_t> mapped_bases(const RemoteCopy& copy, const MappedRegion& region) {
  const uint64_t extent = remote_extent(copy);
  std::vector<uint64_t> bases(copy.num_tensors);
  for (size_t i = 0; i < copy.num_tensors; ++i) {
    const uint64_t offset = copy.remote_bases[i] - region.owner_base;
    if (offset > region.nbytes || extent > region.nbytes - offset) {
      return {};
    }
    bases[i] = region.base + offset;
  }
  return bases;
}

// Runs are (local, remote, nbytes); the copy engine wants the destination first.
std::vector<Run> towards_remote(const RemoteCopy& copy) {
  std::vector<Run> runs(copy.num_runs);
  for (size_t i = 0; i < copy.num_runs; ++i) {
    const int64_t* run = copy.runs + 3 * i;
    runs[i] = {run[1], run[0], run[2]};
  }
  return runs;
}

}  // namespace

MoveState copy_mapped(Direction direction, const RemoteCopy& copy, const MappedRegion& region,
                      const VersionCheck& version, const CopyLimits& limits) {
  static_assert(sizeof(Run) == 3 * sizeof(int64_t), "a Run is a row of the table");
  if (!version.holds_before()) {
    return MoveState::kStale;
  }
  const std::vector<uint64_t> mapped = mapped_bases(copy, region);
  if (mapped.size() != copy.num_tensors) {
    return MoveState::kOutside;
  }
  const Run* given = reinterpret_cast<const Run*>(copy.runs);
  const int64_t total =
      checked_total(given, copy.num_runs) * static_cast<int64_t>(copy.num_tensors);
  int64_t copied = 0;
  if (direction == Direction::kRead) {
    copied = copy_runs({copy.local_bases, mapped.data(), copy.num_tensors}, given, copy.num_runs,
                       limits);
  } else {
    const std::vector<Run> runs = towards_remote(copy);
    copied = copy_runs({mapped.data(), copy.local_bases, copy.num_tensors}, runs.data(),
                       runs.size(), limits);
  }
  if (copied < total) {
    return MoveState::kLate;
  }
  return version.holds_after() ? MoveState::kDone : MoveState::kStale;
}

}  // namespace llmdd
