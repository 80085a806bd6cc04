// SPDX-License-Identifier: Apache-2.0
// Copies between this process and a region of a peer that is mapped here: one call checks the
// peer's counters, finds the peer's addresses in the mapping, copies against a deadline, and checks
// the counters again. Torch-free.

#pragma once

#include <cstddef>
#include <cstdint>

#include "copy_engine.h"
#include "process_memory.h"
#include "version_check.h"

namespace llmdd {

// Where a region of the peer is mapped here.
struct MappedRegion {
  uint64_t owner_base;  // its start in the owner's process
  uint64_t base;        // its start here
  uint64_t nbytes;
};

enum class MoveState {
  kDone = 0,
  kLate = 1,   // the deadline passed; some of the runs are copied
  kStale = 2,  // the cache is not any more what the version says; bytes that were read mean nothing
  kOutside = 3,  // a tensor leaves the region; nothing was copied
};

// Copies `copy`, whose remote bases are addresses in the owner's process. Offsets and sizes must
// not be negative (checked_total). When the call returns, nothing writes any more.
MoveState copy_mapped(Direction direction, const RemoteCopy& copy, const MappedRegion& region,
                      const VersionCheck& version, const CopyLimits& limits);

}  // namespace llmdd
