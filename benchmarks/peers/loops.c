// SPDX-License-Identifier: Apache-2.0
// The ceilings: what a C programmer would write for this one job, without checks, keys, leases or deadlines.
#define _GNU_SOURCE
#include <pthread.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <sys/uio.h>

enum { kBatch = 1024, kMaxThreads = 64 };

typedef struct {
  int pid, write;  // pid 0: both sides are in this process's address space
  const int64_t *dst, *src, *dst_ids, *src_ids;
  int64_t blocks, nbytes, begin, end;
  int failed;
} Part;

static void copy_part(const Part* part) {
  for (int64_t i = part->begin; i < part->end; ++i) {
    const int64_t t = i / part->blocks, b = i % part->blocks;
    memcpy((char*)part->dst[t] + part->dst_ids[b] * part->nbytes,
           (const char*)part->src[t] + part->src_ids[b] * part->nbytes, (size_t)part->nbytes);
  }
}

// 1024 blocks for each system call.
static void call_part(Part* part) {
  struct iovec dst[kBatch], src[kBatch];
  int64_t queued = 0;
  for (int64_t i = part->begin; i < part->end; ++i) {
    const int64_t t = i / part->blocks, b = i % part->blocks;
    dst[queued].iov_base = (char*)part->dst[t] + part->dst_ids[b] * part->nbytes;
    src[queued].iov_base = (char*)part->src[t] + part->src_ids[b] * part->nbytes;
    dst[queued].iov_len = src[queued].iov_len = (size_t)part->nbytes;
    if (++queued < kBatch && i + 1 < part->end) continue;
    const unsigned long n = (unsigned long)queued;
    const ssize_t moved = part->write ? process_vm_writev(part->pid, src, n, dst, n, 0)
                                      : process_vm_readv(part->pid, dst, n, src, n, 0);
    if (moved != queued * part->nbytes) {
      part->failed = 1;
      return;
    }
    queued = 0;
  }
}

static void* run_part(void* argument) {
  Part* part = argument;
  if (part->pid == 0) {
    copy_part(part);
  } else {
    call_part(part);
  }
  return NULL;
}

// Moves blocks of `tensors` pairs of tensors, split over threads. Returns 0, or -1 with errno set.
int move_blocks(int pid, int write, const int64_t* dst, const int64_t* src, int64_t tensors,
                const int64_t* dst_ids, const int64_t* src_ids, int64_t blocks, int64_t nbytes,
                int64_t threads) {
  Part parts[kMaxThreads];
  pthread_t started[kMaxThreads];
  const int64_t total = tensors * blocks;
  int failed = 0;
  for (int64_t n = 0; n < threads; ++n) {
    parts[n] = (Part){pid,    write,  dst, src, dst_ids, src_ids, blocks, nbytes, total * n / threads,
                      total * (n + 1) / threads, 0};
    if (n > 0 && pthread_create(&started[n], NULL, run_part, &parts[n]) != 0) return -1;
  }
  run_part(&parts[0]);
  failed = parts[0].failed;
  for (int64_t n = 1; n < threads; ++n) {
    pthread_join(started[n], NULL);
    failed |= parts[n].failed;
  }
  return failed ? -1 : 0;
}
