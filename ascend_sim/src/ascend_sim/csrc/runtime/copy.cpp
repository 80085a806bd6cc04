// SPDX-License-Identifier: Apache-2.0
#include "copy.h"

#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "../sim_api.h"
#include "errors.h"
#include "memory.h"
#include "peers.h"

namespace sim {
namespace {

bool is_device(const void* address) { return is_device_address(to_int(address)); }

bool is_pinned(const void* address, size_t count) {
  Range range;
  const uintptr_t start = to_int(address);
  return find_pinned(start, &range) && start - range.start + count <= range.size;
}

const char* place_of(const void* address) { return is_device(address) ? "device" : "host"; }

// Whether the memory is where the kind says. ACL_MEMCPY_DEFAULT says nothing.
bool fits_kind(bool to_device, bool from_device, aclrtMemcpyKind kind) {
  switch (kind) {
    case ACL_MEMCPY_HOST_TO_HOST:
      return !from_device && !to_device;
    case ACL_MEMCPY_HOST_TO_DEVICE:
    case ACL_MEMCPY_HOST_TO_BUF_TO_DEVICE:
      return !from_device && to_device;
    case ACL_MEMCPY_DEVICE_TO_HOST:
      return from_device && !to_device;
    case ACL_MEMCPY_DEVICE_TO_DEVICE:
    case ACL_MEMCPY_INNER_DEVICE_TO_DEVICE:
    case ACL_MEMCPY_INTER_DEVICE_TO_DEVICE:
      return from_device && to_device;
    default:
      return kind == ACL_MEMCPY_DEFAULT;
  }
}

// Memory of another device can be reached once aclrtDeviceEnablePeerAccess, or the flag of an
// import, has allowed it. What matters is where memory is, not where it has been imported to.
int check_reach(const Copy& copy) {
  Range dst;
  Range src;
  const bool to = is_device(copy.dst) && find_range(to_int(copy.dst), &dst);
  const bool from = is_device(copy.src) && find_range(to_int(copy.src), &src);
  int here = ascend_sim_current_device();
  int there = here;
  if (to && from) {
    here = dst.physical->home;
    there = src.physical->home;
  } else if (const Range& one = to ? dst : src; (to || from) && one.physical->is_imported()) {
    there = one.physical->home;
  }
  if (is_peer_enabled(here, there) || is_peer_enabled(there, here)) return 0;
  return fail(ACL_ERROR_RT_FEATURE_NOT_SUPPORT,
              "device %d may not reach memory of device %d: no aclrtDeviceEnablePeerAccess", here,
              there);
}

// Host memory is the program's: the kernel finds out whether it is there.
int copy_guarded(void* dst, const void* src, size_t count) {
  while (count > 0) {
    const size_t step = std::min(count, size_t{1} << 30);
    const iovec local{dst, step};
    const iovec remote{const_cast<void*>(src), step};
    const ssize_t moved = process_vm_readv(getpid(), &local, 1, &remote, 1, 0);
    if (moved < 0 && (errno == EPERM || errno == ENOSYS)) {
      std::memmove(dst, src,
                   count);  // not allowed here; then a wild pointer crashes, as it would anywhere
      return 0;
    }
    if (moved <= 0) {
      return fail(ACL_ERROR_RT_PARAM_INVALID,
                  "host memory of the copy isn't there (%zu bytes left)", count);
    }
    dst = static_cast<char*>(dst) + moved;
    src = static_cast<const char*>(src) + moved;
    count -= static_cast<size_t>(moved);
  }
  return 0;
}

int run_one(const Copy& copy) {
  if (copy.count == 0) return 0;
  void* dst = ascend_sim_alias(copy.dst, copy.count);
  const void* src = ascend_sim_alias(copy.src, copy.count);
  if (dst == nullptr || src == nullptr) {
    return fail(ACL_ERROR_RT_SYS_DMA,
                "%p: device memory of a copy of %zu bytes was freed before it ran",
                dst == nullptr ? copy.dst : copy.src, copy.count);
  }
  if (is_device(copy.dst) && is_device(copy.src)) {
    std::memmove(dst, src, copy.count);
    return 0;
  }
  return copy_guarded(dst, src, copy.count);
}

}  // namespace

int check(const Copy& copy, size_t limit, aclrtMemcpyKind kind) {
  if (copy.count > limit) {
    return fail(ACL_ERROR_RT_PARAM_INVALID, "%zu bytes are more than the destination's limit %zu",
                copy.count, limit);
  }
  if (copy.count == 0) return 0;
  if (copy.dst == nullptr || copy.src == nullptr)
    return fail(ACL_ERROR_RT_PARAM_INVALID, "a null address");
  if (!fits_kind(is_device(copy.dst), is_device(copy.src), kind)) {
    return fail(ACL_ERROR_RT_PARAM_INVALID, "copy from %s to %s memory has kind %d",
                place_of(copy.src), place_of(copy.dst), kind);
  }
  for (const void* address : {static_cast<const void*>(copy.dst), copy.src}) {
    if (ascend_sim_alias(address, copy.count) == nullptr) {
      return fail(ACL_ERROR_RT_PARAM_INVALID, "%p: %zu bytes aren't wholly allocated", address,
                  copy.count);
    }
  }
  return check_reach(copy);
}

int check_async(const Copy& copy, size_t limit, aclrtMemcpyKind kind) {
  if (kind == ACL_MEMCPY_HOST_TO_HOST ||
      (copy.count > 0 && !is_device(copy.dst) && !is_device(copy.src))) {
    return fail(ACL_ERROR_RT_FEATURE_NOT_SUPPORT,
                "asynchronous copies from host to host aren't supported");
  }
  return check(copy, limit, kind);
}

bool touches_pageable(const Copy& copy) {
  const auto pageable = [&](const void* address) {
    return !is_device(address) && !is_pinned(address, copy.count);
  };
  return pageable(copy.dst) || pageable(copy.src);
}

int run(const std::vector<Copy>& copies) {
  for (const Copy& copy : copies) {
    if (const int code = run_one(copy); code != 0) return code;
  }
  return 0;
}

}  // namespace sim
