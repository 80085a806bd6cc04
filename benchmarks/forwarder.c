// SPDX-License-Identifier: Apache-2.0
// Passes packets between two TUN devices, each after a delay: a wire that takes its time.
#define _GNU_SOURCE
#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/prctl.h>
#include <time.h>
#include <unistd.h>

enum { kSlots = 1024, kPacketBytes = 65536 };

typedef struct {
  int from, to;
  int64_t delay_ns;
} Way;

typedef struct {
  int64_t due_ns;
  ssize_t nbytes;
  char bytes[kPacketBytes];
} Packet;

static int64_t now_ns(void) {
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return now.tv_sec * 1000000000LL + now.tv_nsec;
}

// One direction. Packets keep their order; where all slots are taken, the device's queue waits.
static void* run_way(void* argument) {
  const Way* way = argument;
  Packet* slots = malloc(sizeof(Packet) * kSlots);  // a page is taken when a packet first needs it
  uint64_t first = 0, end = 0;
  if (slots == NULL) return NULL;
  prctl(PR_SET_TIMERSLACK, 1);
  for (;;) {
    const int room = end - first < kSlots;
    struct timespec left = {0, 0}, *timeout = NULL;
    if (first < end) {
      int64_t wait_ns = slots[first % kSlots].due_ns - now_ns();
      if (wait_ns < 0) wait_ns = 0;
      left.tv_sec = wait_ns / 1000000000LL;
      left.tv_nsec = wait_ns % 1000000000LL;
      timeout = &left;
    }
    struct pollfd input = {room ? way->from : -1, POLLIN, 0};
    if (ppoll(&input, 1, timeout, NULL) < 0 && errno != EINTR) break;
    if (input.revents & (POLLERR | POLLHUP | POLLNVAL)) break;
    if (input.revents & POLLIN) {
      Packet* packet = &slots[end % kSlots];
      packet->nbytes = read(way->from, packet->bytes, kPacketBytes);
      if (packet->nbytes > 0) {
        packet->due_ns = now_ns() + way->delay_ns;
        ++end;
      }
    }
    while (first < end && slots[first % kSlots].due_ns <= now_ns()) {
      const Packet* packet = &slots[first++ % kSlots];
      // What can't be written is lost, as on a wire, and TCP sends it again.
      ssize_t written = write(way->to, packet->bytes, (size_t)packet->nbytes);
      (void)written;
    }
  }
  free(slots);
  return NULL;
}

// Until the process is ended, or a device is gone.
int forward(int one, int other, int64_t delay_ns) {
  Way there = {one, other, delay_ns}, back = {other, one, delay_ns};
  pthread_t thread;
  if (pthread_create(&thread, NULL, run_way, &back) != 0) return -1;
  run_way(&there);
  return 0;
}
