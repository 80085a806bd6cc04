// SPDX-License-Identifier: Apache-2.0
// Is an address range really mapped, readable and writable in this process?

#pragma once

#include <cstddef>
#include <cstdint>

namespace llmdd {

struct ProbeResult {
  int64_t index;       // of the first bad extent, -1 = all are good
  const char* reason;  // "" if all are good
};

// Checks the extents [addresses[i], addresses[i] + nbytes) against /proc/self/maps, which is read
// once. The reason is "address 0", "not mapped", "not readable" or "not writable". The answer is as
// good as the moment it was taken in; pages of a file beyond its end are mapped, though touching
// them faults. Throws OsError where the kernel doesn't show the maps.
ProbeResult probe_extents(const uint64_t* addresses, size_t count, uint64_t nbytes);

// The cheaper question for every call: index of the first extent that isn't wholly mapped, -1 =
// none. One system call per extent.
int64_t check_mapped(const uint64_t* addresses, size_t count, uint64_t nbytes);

}  // namespace llmdd
