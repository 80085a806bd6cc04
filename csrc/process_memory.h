// SPDX-License-Identifier: Apache-2.0
// Copies between this process and another one's memory through process_vm_readv/writev: no mapping
// and no cooperation of the peer needed, only the kernel's leave to trace it.

#pragma once

#include <sys/types.h>

#include <cstddef>
#include <cstdint>

namespace llmdd {

enum class Direction { kRead, kWrite };

// The process whose memory is read or written: its pid, and how to see that the pid is still its
// own. A pidfd says so wherever the kernel has them (5.3 and later), else the time at which the
// process started. Neither: the pid is trusted, as for this very process.
struct PeerProcess {
  pid_t pid;
  int pidfd = -1;           // -1: none
  int64_t start_time = -1;  // clock ticks after boot, as in /proc/PID/stat; -1: unknown
};

// Whether the process still runs, so that its pid can't be another's. A zombie does not run.
bool is_running(const PeerProcess& process);

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

// Moves the bytes of `copy` between this process (local) and `process` (remote). It looks before
// each system call, and after the last, whether the process still runs; ESRCH where it does not.
//
// bytes_done < total with error == 0 means that the deadline (CLOCK_MONOTONIC, 0 = none) passed; it
// is looked at before every system call, each of which moves 4 MiB at most. Large totals
// are split over threads: bytes_done then counts what all of them moved, which need not be a
// prefix. When the call returns, nothing writes any more. Offsets and sizes must have been checked:
// nbytes >= 0.
RemoteCopyResult copy_remote(const PeerProcess& process, Direction direction,
                             const RemoteCopy& copy, int64_t deadline_ns);

}  // namespace llmdd
