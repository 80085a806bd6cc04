// SPDX-License-Identifier: Apache-2.0
// What every call goes through first: counting, fault injection, and whether its device is still
// there.
#pragma once

namespace sim {

// Counts a call; returns the aclError that it is to return at once, or 0.
int enter(const char* function);

// True if fault injection took the device away.
bool is_away(int device);

}  // namespace sim

// First line of every simulated function: ASCEND_SIM_ENTER(aclrtMalloc).
#define ASCEND_SIM_ENTER(function)                                 \
  if (const int entered = ::sim::enter(#function); entered != 0) { \
    return entered;                                                \
  }                                                                \
  static_assert(true, "")
