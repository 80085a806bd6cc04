// SPDX-License-Identifier: Apache-2.0
// Device memory for other processes: by key (aclrtIpcMem*) and by shareable handle. Both name a
// small file of the exporting process that says where the memory is and who may have it; the memory
// itself is a file, too.
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cinttypes>
#include <cstdio>
#include <cstring>
#include <map>
#include <mutex>
#include <string>

#include "../sim_api.h"
#include "acl/acl.h"
#include "errors.h"
#include "faults.h"
#include "handles.h"
#include "memory.h"

using sim::fail;
using sim::PhysicalPtr;
using sim::to_int;

namespace {

constexpr uint64_t kMagic = 0x4D495344'4E454353;
constexpr size_t kMaxPids = 128;
constexpr size_t kKeyBytes = 65;

struct Export {
  uint64_t magic;
  uint64_t nonce;  // a process that got the number of one that ended has another
  uint64_t offset;
  uint64_t size;
  int32_t fd;
  int32_t checks_pid;
  int32_t pid_count;
  int32_t pids[kMaxPids];
};

struct Exported {
  int fd;
  PhysicalPtr physical;  // lives as long as the key
};

std::mutex mutex;

std::map<std::string, Exported>& exports() {
  static auto& the = *new std::map<std::string, Exported>;
  return the;
}

std::map<std::string, uintptr_t>& imports() {
  static auto& the = *new std::map<std::string, uintptr_t>;
  return the;
}

int write_export(const PhysicalPtr& physical, size_t offset, size_t size, bool checks_pid,
                 Export* out) {
  *out = {};
  out->magic = kMagic;
  out->offset = physical->offset + offset;
  out->size = size;
  out->fd = physical->fd;
  out->checks_pid = checks_pid;
  if (getrandom(&out->nonce, sizeof out->nonce, 0) < 0) return -1;
  const int fd = memfd_create("ascend_sim_export", MFD_CLOEXEC);
  if (fd >= 0 && pwrite(fd, out, sizeof *out, 0) != static_cast<ssize_t>(sizeof *out)) {
    close(fd);
    return -1;
  }
  physical->is_exported = true;
  return fd;
}

int open_file_of(int pid, int fd) {
  const std::string path = "/proc/" + std::to_string(pid) + "/fd/" + std::to_string(fd);
  return open(path.c_str(), O_RDWR | O_CLOEXEC);
}

// Opens exported memory, if this process may have it. The result isn't counted as this device's
// own.
int import(int pid, int export_fd, const uint64_t* nonce, PhysicalPtr* out) {
  Export found{};
  const int fd = open_file_of(pid, export_fd);
  const bool is_read =
      fd >= 0 && pread(fd, &found, sizeof found, 0) == static_cast<ssize_t>(sizeof found);
  if (fd >= 0) close(fd);
  if (!is_read || found.magic != kMagic || (nonce != nullptr && *nonce != found.nonce)) {
    return fail(ACL_ERROR_RT_INVALID_HANDLE,
                "nothing is exported under this name (any more) by process %d", pid);
  }
  int32_t* const end = found.pids + std::clamp<int32_t>(found.pid_count, 0, kMaxPids);
  if (found.checks_pid != 0 && pid != getpid() && std::find(found.pids, end, getpid()) == end) {
    return fail(ACL_ERROR_RT_NO_PERMISSION, "process %d did not allow process %d to import", pid,
                getpid());
  }
  const int memory = open_file_of(pid, found.fd);
  if (memory < 0)
    return fail(ACL_ERROR_RT_IPC_ERROR, "the memory of process %d can't be opened: %m", pid);
  *out = std::make_shared<sim::Physical>(std::max(ascend_sim_current_device(), 0), memory,
                                         found.offset, found.size, false);
  (*out)->is_fresh = false;
  return 0;
}

int allow(int fd, const int32_t* pids, size_t count) {
  Export found{};
  if (pread(fd, &found, sizeof found, 0) != static_cast<ssize_t>(sizeof found)) {
    return fail(ACL_ERROR_RT_IPC_ERROR, "the export can't be read: %m");
  }
  if (count > kMaxPids - found.pid_count)
    return fail(ACL_ERROR_RT_OVER_LIMIT, "more than %zu processes", kMaxPids);
  std::copy_n(pids, count, found.pids + found.pid_count);
  found.pid_count += static_cast<int32_t>(count);
  if (pwrite(fd, &found, sizeof found, 0) == static_cast<ssize_t>(sizeof found)) return 0;
  return fail(ACL_ERROR_RT_IPC_ERROR, "the export can't be written: %m");
}

}  // namespace

aclError aclrtIpcMemGetExportKey(void* address, size_t size, char* key, size_t length,
                                 uint64_t flags) {
  ASCEND_SIM_ENTER(aclrtIpcMemGetExportKey);
  sim::Range range;
  const uintptr_t start = to_int(address);
  if (length < kKeyBytes || !sim::is_device_address(start) || !sim::find_range(start, &range) ||
      size == 0 || size > range.size - (start - range.start)) {
    return fail(ACL_ERROR_RT_PARAM_INVALID,
                "%p: %zu bytes are no part of one allocation, or no room for a key", address, size);
  }
  Export content;
  const bool checks_pid = (flags & ACL_RT_IPC_MEM_EXPORT_FLAG_DISABLE_PID_VALIDATION) == 0;
  const size_t offset = range.offset + (start - range.start);
  const int fd = write_export(range.physical, offset, size, checks_pid, &content);
  if (fd < 0) return fail(ACL_ERROR_RT_IPC_ERROR, "no file for the key: %m");
  std::memset(key, 0, length);
  std::snprintf(key, kKeyBytes, "ascend-sim:%d:%d:%016" PRIx64, getpid(), fd, content.nonce);
  std::lock_guard<std::mutex> lock(mutex);
  exports()[key] = {fd, range.physical};
  return 0;
}

aclError aclrtIpcMemSetImportPid(const char* key, int32_t* pids, size_t count) {
  ASCEND_SIM_ENTER(aclrtIpcMemSetImportPid);
  std::lock_guard<std::mutex> lock(mutex);
  const auto found = exports().find(key);
  if (found == exports().end())
    return fail(ACL_ERROR_RT_INVALID_HANDLE, "this process exported no %s", key);
  return allow(found->second.fd, pids, count);
}

aclError aclrtIpcMemImportByKey(void** out, const char* key, uint64_t) {
  ASCEND_SIM_ENTER(aclrtIpcMemImportByKey);
  int pid = 0;
  int fd = 0;
  uint64_t nonce = 0;
  if (std::sscanf(key, "ascend-sim:%d:%d:%16" SCNx64, &pid, &fd, &nonce) != 3) {
    return fail(ACL_ERROR_RT_PARAM_INVALID, "not a key");
  }
  PhysicalPtr physical;
  if (const int code = import(pid, fd, &nonce, &physical); code != 0) return code;
  // Mappings are of whole pages, exports needn't be.
  const size_t lead = physical->offset % sim::kPage;
  const auto whole = std::make_shared<sim::Physical>(
      physical->device, dup(physical->fd), physical->offset - lead, physical->size + lead, false);
  whole->is_fresh = false;
  const uintptr_t start = sim::reserve_addresses(whole->size, sim::kHugePage);
  if (start == 0 || !sim::map_physical(start, whole->size, whole, 0)) {
    return fail(ACL_ERROR_RT_MEMORY_ALLOCATION, "no addresses for %zu bytes", whole->size);
  }
  std::lock_guard<std::mutex> lock(mutex);
  imports()[key] = start;
  *out = sim::to_pointer(start + lead);
  return 0;
}

aclError aclrtIpcMemClose(const char* key) {
  ASCEND_SIM_ENTER(aclrtIpcMemClose);
  PhysicalPtr dropped;
  std::lock_guard<std::mutex> lock(mutex);
  if (const auto found = imports().find(key); found != imports().end()) {
    sim::release_addresses(found->second);
    imports().erase(found);
    return 0;
  }
  const auto found = exports().find(key);
  if (found == exports().end()) return fail(ACL_ERROR_RT_INVALID_HANDLE, "no such key");
  close(found->second.fd);
  dropped = std::move(found->second.physical);
  exports().erase(found);
  return 0;
}

aclError aclrtMemExportToShareableHandle(aclrtDrvMemHandle handle, aclrtMemHandleType,
                                         uint64_t flags, uint64_t* out) {
  ASCEND_SIM_ENTER(aclrtMemExportToShareableHandle);
  const PhysicalPtr physical = sim::find_handle(handle);
  if (physical == nullptr) return fail(ACL_ERROR_RT_INVALID_HANDLE, "no such memory handle");
  Export content;
  const bool checks_pid = (flags & ACL_RT_VMM_EXPORT_FLAG_DISABLE_PID_VALIDATION) == 0;
  // The file stays open until the process ends: shareable handles have no close.
  const int fd = write_export(physical, 0, physical->size, checks_pid, &content);
  if (fd < 0) return fail(ACL_ERROR_RT_IPC_ERROR, "no file for the handle: %m");
  *out = static_cast<uint64_t>(getpid()) << 32 | static_cast<uint32_t>(fd);
  return 0;
}

aclError aclrtMemSetPidToShareableHandle(uint64_t shared, int32_t* pids, size_t count) {
  ASCEND_SIM_ENTER(aclrtMemSetPidToShareableHandle);
  if (static_cast<int>(shared >> 32) != getpid()) {
    return fail(ACL_ERROR_RT_INVALID_HANDLE, "this process did not export it");
  }
  return allow(static_cast<int>(shared & UINT32_MAX), pids, count);
}

aclError aclrtMemImportFromShareableHandle(uint64_t shared, int32_t, aclrtDrvMemHandle* out) {
  ASCEND_SIM_ENTER(aclrtMemImportFromShareableHandle);
  PhysicalPtr physical;
  const int pid = static_cast<int>(shared >> 32);
  if (const int code = import(pid, static_cast<int>(shared & UINT32_MAX), nullptr, &physical);
      code != 0)
    return code;
  *out = sim::add_handle(physical);
  return 0;
}
