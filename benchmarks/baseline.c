// SPDX-License-Identifier: Apache-2.0
// The baselines of bench_pull: what a C programmer would write for this one job, without checks, keys, leases or deadlines.
#define _GNU_SOURCE
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <sys/uio.h>

enum { kBatch = 1024 };

// Copies blocks one by one between two sets of tensors in this process's address space.
void copy_loop(const int64_t* dst, const int64_t* src, int64_t tensors, const int64_t* dst_ids,
               const int64_t* src_ids, int64_t blocks, int64_t nbytes) {
  for (int64_t t = 0; t < tensors; ++t) {
    for (int64_t b = 0; b < blocks; ++b) {
      memcpy((char*)dst[t] + dst_ids[b] * nbytes, (const char*)src[t] + src_ids[b] * nbytes,
             (size_t)nbytes);
    }
  }
}

// Reads the same blocks out of another process, 1024 per system call. Returns 0, or -1 with errno set.
int read_loop(int pid, const int64_t* dst, const int64_t* src, int64_t tensors,
              const int64_t* dst_ids, const int64_t* src_ids, int64_t blocks, int64_t nbytes) {
  struct iovec local[kBatch], remote[kBatch];
  int64_t queued = 0, total = tensors * blocks;
  for (int64_t i = 0; i < total; ++i) {
    int64_t t = i / blocks, b = i % blocks;
    local[queued] = (struct iovec){(char*)dst[t] + dst_ids[b] * nbytes, (size_t)nbytes};
    remote[queued] = (struct iovec){(char*)src[t] + src_ids[b] * nbytes, (size_t)nbytes};
    if (++queued == kBatch || i + 1 == total) {
      if (process_vm_readv(pid, local, (unsigned long)queued, remote, (unsigned long)queued, 0) !=
          queued * nbytes) {
        return -1;
      }
      queued = 0;
    }
  }
  return 0;
}
