// SPDX-License-Identifier: Apache-2.0
// As much of AscendCL as copies use, as nasty as it may be: nothing happens before somebody waits,
// a batch is done backwards, and a single copy byte by byte from its middle on.

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <set>
#include <utility>
#include <vector>

namespace {

using Task = std::function<void()>;
std::vector<Task> queue;
std::set<const void*> page_locked;
int fail_in = 0;
int fail_code = 0;
size_t largest_batch = 0;
size_t batches = 0;
size_t singles = 0;

void copy(void* dst, const void* src, size_t nbytes) {
  for (size_t i = 0; i < nbytes; ++i) {
    const size_t at = (i + nbytes / 2) % nbytes;
    static_cast<uint8_t*>(dst)[at] = static_cast<const uint8_t*>(src)[at];
  }
}

bool fails() { return fail_in > 0 && --fail_in == 0; }

struct Location {
  uint32_t device;
  uint32_t place;
};

struct PointerAttributes {
  Location location;
  uint32_t page_size;
  uint32_t reserved[4];
};

struct BatchAttributes {
  Location dst;
  Location src;
  uint8_t reserved[16];
};

}  // namespace

extern "C" {

void fake_reset() {
  queue.clear();
  page_locked.clear();
  fail_in = fail_code = 0;
  largest_batch = batches = singles = 0;
}
void fake_lock(const void* address) { page_locked.insert(address); }
void fake_fail(int call, int code) {
  fail_in = call;
  fail_code = code;
}
size_t fake_pending() { return queue.size(); }
size_t fake_largest_batch() { return largest_batch; }
size_t fake_batches() { return batches; }
size_t fake_singles() { return singles; }

int aclrtGetDevice(int32_t* device) {
  *device = 3;
  return 0;
}
int aclrtSetDevice(int32_t) { return 0; }
int aclrtDeviceEnablePeerAccess(int32_t, uint32_t) { return 0; }
const char* aclGetRecentErrMsg() { return "the fake was told to fail"; }

int aclrtMemcpyAsync(void* dst, size_t room, const void* src, size_t nbytes, int, void*) {
  if (fails()) return fail_code;
  if (room < nbytes) return 107000;
  ++singles;
  queue.push_back([=] { copy(dst, src, nbytes); });
  return 0;
}

int aclrtSynchronizeStream(void*) {
  for (const Task& task : std::exchange(queue, {})) task();
  return 0;
}

int aclrtPointerGetAttributes(const void* address, PointerAttributes* attributes) {
  attributes->location = {0, page_locked.count(address) != 0 ? 0u : 2u};
  return 0;
}

#ifndef NO_BATCH
int aclrtMemcpyBatchAsync(void** dsts, size_t* rooms, void** srcs, size_t* sizes, size_t count,
                          BatchAttributes* attributes, size_t* first_of, size_t num_attributes,
                          size_t* failed, void*) {
  if (fails()) return fail_code;
  const uint32_t places[] = {attributes->dst.place, attributes->src.place};
  const uint32_t device = places[0] == 1 ? attributes->dst.device : attributes->src.device;
  if (count > 4096 || num_attributes != 1 || first_of[0] != 0 || places[0] + places[1] != 1 ||
      device != 3) {
    *failed = 0;
    return 107000;
  }
  ++batches;
  largest_batch = count > largest_batch ? count : largest_batch;
  for (size_t i = count; i-- > 0;) {
    if (rooms[i] < sizes[i]) return 107000;
    queue.push_back([dst = dsts[i], src = srcs[i], nbytes = sizes[i]] { copy(dst, src, nbytes); });
  }
  return 0;
}
#endif

}  // extern "C"
