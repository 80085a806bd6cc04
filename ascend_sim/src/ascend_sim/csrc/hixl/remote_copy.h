// SPDX-License-Identifier: Apache-2.0
// One-sided copies between this process and another's memory: runtime/remote_copy.cpp.
#pragma once

#include "../sim_api.h"

// Addresses that may really be read and written: aliases of device memory, or host memory.
struct AscendSimPiece {
  uint64_t local;
  uint64_t remote;
  uint64_t length;
};

// Copies pieces from (or, if `write`, to) the memory of process `pid`, which may be this one.
// Returns 0 or an errno: EFAULT for a bad address on either side, ESRCH if there is no such
// process. Never faults.
ASCEND_SIM_API int ascend_sim_remote_copy(int32_t pid, int32_t write, const AscendSimPiece* pieces,
                                          size_t count);

// Lets other processes of this user copy from and to this one where the Yama security module
// forbids it by default.
ASCEND_SIM_API void ascend_sim_allow_remote_copies(void);
