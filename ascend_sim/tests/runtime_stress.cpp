// SPDX-License-Identifier: Apache-2.0
// Drives the simulated runtime from several threads at once, for scripts/test_sanitize_sim.sh:
// allocation, copies, streams, events, failing tasks, memory freed under tasks. Its data are
// checked; the sanitizers check the rest.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>

#include "acl/acl.h"

#define EXPECT(condition)                                                                  \
  if (!(condition)) {                                                                      \
    std::fprintf(stderr, "line %d: %s: %s\n", __LINE__, #condition, aclGetRecentErrMsg()); \
    std::abort();                                                                          \
  }

namespace {

constexpr size_t kBytes = 1 << 14;
constexpr int kRounds = 200;
constexpr int kThreads = 4;

aclrtStream make_stream() {
  aclrtStream stream = nullptr;
  EXPECT(aclrtCreateStream(&stream) == 0);
  return stream;
}

aclrtEvent make_event() {
  aclrtEvent event = nullptr;
  EXPECT(aclrtCreateEventExWithFlag(&event, ACL_EVENT_SYNC | ACL_EVENT_TIME_LINE) == 0);
  return event;
}

// Host to device in one stream, device to device in another, and back in a third, in order by
// events.
void pass_along(char* from, char* to, int number) {
  void* first = nullptr;
  void* second = nullptr;
  EXPECT(aclrtMalloc(&first, kBytes, ACL_MEM_MALLOC_HUGE_FIRST) == 0);
  EXPECT(aclrtMalloc(&second, kBytes, ACL_MEM_MALLOC_HUGE_FIRST) == 0);
  aclrtStream streams[3] = {make_stream(), make_stream(), make_stream()};
  aclrtEvent events[2] = {make_event(), make_event()};
  std::memset(from, number, kBytes);
  std::memset(to, 0, kBytes);
  EXPECT(aclrtMemcpyAsync(first, kBytes, from, kBytes, ACL_MEMCPY_HOST_TO_DEVICE, streams[0]) == 0);
  EXPECT(aclrtRecordEvent(events[0], streams[0]) == 0);
  EXPECT(aclrtStreamWaitEvent(streams[1], events[0]) == 0);
  EXPECT(aclrtMemcpyAsync(second, kBytes, first, kBytes, ACL_MEMCPY_DEVICE_TO_DEVICE, streams[1]) ==
         0);
  EXPECT(aclrtRecordEvent(events[1], streams[1]) == 0);
  EXPECT(aclrtStreamWaitEvent(streams[2], events[1]) == 0);
  EXPECT(aclrtMemcpyAsync(to, kBytes, second, kBytes, ACL_MEMCPY_DEVICE_TO_HOST, streams[2]) == 0);
  EXPECT(aclrtSynchronizeStream(streams[2]) == 0);
  EXPECT(std::memcmp(from, to, kBytes) == 0);
  float milliseconds = -1;
  EXPECT(aclrtEventElapsedTime(&milliseconds, events[0], events[1]) == 0 && milliseconds >= 0);
  for (aclrtEvent event : events) EXPECT(aclrtDestroyEvent(event) == 0);
  for (aclrtStream stream : streams) EXPECT(aclrtDestroyStream(stream) == 0);
  EXPECT(aclrtFree(first) == 0);
  EXPECT(aclrtFree(second) == 0);
}

// The task finds its memory gone: an error or poison, nothing else.
void free_under_a_task(char* to) {
  void* memory = nullptr;
  EXPECT(aclrtMalloc(&memory, kBytes, ACL_MEM_MALLOC_HUGE_FIRST) == 0);
  aclrtStream stream = make_stream();
  EXPECT(aclrtMemcpyAsync(to, kBytes, memory, kBytes, ACL_MEMCPY_DEVICE_TO_HOST, stream) == 0);
  EXPECT(aclrtFree(memory) == 0);
  aclrtSynchronizeStream(stream);
  EXPECT(aclrtDestroyStream(stream) == 0);
}

// All threads use one stream and one event.
void share(aclrtStream stream, aclrtEvent event, void* memory, int number) {
  EXPECT(aclrtMemsetAsync(memory, kBytes, number, kBytes, stream) == 0);
  EXPECT(aclrtRecordEvent(event, stream) == 0);
  aclrtEventRecordedStatus status = ACL_EVENT_RECORDED_STATUS_NOT_READY;
  EXPECT(aclrtQueryEventStatus(event, &status) == 0);
  EXPECT(aclrtStreamWaitEvent(stream, event) == 0);
  EXPECT(aclrtSynchronizeEvent(event) == 0);
  EXPECT(aclrtSynchronizeDevice() == 0);
}

void work(int number, aclrtStream stream, aclrtEvent event, void* shared) {
  EXPECT(aclrtSetDevice(0) == 0);
  void* from = nullptr;
  void* to = nullptr;
  EXPECT(aclrtMallocHost(&from, kBytes) == 0);
  EXPECT(aclrtMallocHost(&to, kBytes) == 0);
  for (int round = 0; round < kRounds; ++round) {
    pass_along(static_cast<char*>(from), static_cast<char*>(to), number + round);
    share(stream, event, shared, number);
    // Its error is the stream's own, but a synchronisation of the device would report it elsewhere.
    if (number == kThreads) free_under_a_task(static_cast<char*>(to));
  }
  EXPECT(aclrtFreeHost(from) == 0);
  EXPECT(aclrtFreeHost(to) == 0);
}

}  // namespace

int main() {
  EXPECT(aclInit(nullptr) == 0);
  EXPECT(aclrtSetDevice(0) == 0);
  void* shared = nullptr;
  EXPECT(aclrtMalloc(&shared, kBytes, ACL_MEM_MALLOC_HUGE_FIRST) == 0);
  aclrtStream stream = make_stream();
  aclrtEvent event = make_event();
  std::vector<std::thread> threads;
  for (int number = 0; number < kThreads; ++number)
    threads.emplace_back(work, number, stream, event, shared);
  for (std::thread& thread : threads) thread.join();
  work(kThreads, stream, event, shared);
  std::printf("ok\n");
  return 0;
}
