// SPDX-License-Identifier: Apache-2.0
// Copies between this process and another one's memory through process_vm_readv/writev: no mapping
// and no cooperation of the peer needed, only the kernel's leave to trace it.

#pragma once

#include <sys/types.h>

#include <cstddef>
#include <cstdint>

namespace llmdd {

enum class Direction { kRead, kWrite };

// What to move: every run applies to every pair of tensors. A run is three numbers (local offset,
// remote offset, nbytes), offsets counted from the tensors' bases.
struct RemoteCopy {
  const uint64_t* local_bases;
  const uint64_t* remote_bases;
  size_t num_tensors;
  const int64_t* runs;  // [num_runs][3]
  size_t num_runs;
};

struct RemoteCopyResult {
  uint64_t bytes_done;
  int error;  // errno of the first failure, 0 = none
};

// Moves the bytes of `copy` between this process (local) and `pid` (remote).
//
// bytes_done < total with error == 0 means that the deadline (CLOCK_MONOTONIC, 0 = none) passed; it
// is looked at before every system call, each of which moves 4 MiB at most. Large totals
// are split over threads: bytes_done then counts what all of them moved, which need not be a
// prefix. When the call returns, nothing writes any more. Offsets and sizes must have been checked:
// nbytes >= 0.
RemoteCopyResult copy_remote(pid_t pid, Direction direction, const RemoteCopy& copy,
                             int64_t deadline_ns);

}  // namespace llmdd
