// SPDX-License-Identifier: Apache-2.0
// Device memory for other processes: by key (aclrtIpcMem*) and by shareable handle. Both name a
// small file of the exporting process that says where the memory is and who may have it; the memory
// itself is a file, too.
#include <fcntl.h>
#include <sys/file.h>
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
#include "ipc.h"
#include "memory.h"
#include "peers.h"

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
  int32_t device;
  int32_t checks_pid;
  int32_t pid_count;
  int32_t pids[kMaxPids];  // as aclrtDeviceGetBareTgid numbers them
};

struct Exported {
  int fd;
  uintptr_t start;
};

// A shared lock on the file of an export says that its memory is in use, also to a process that
// only sees that somebody has it; it ends with the process.
struct Imported {
  int fd;
  uintptr_t start;
};

std::mutex mutex;

std::map<std::string, Exported>& exports() {
  static auto& the = *new std::map<std::string, Exported>;
  return the;
}

std::map<std::string, Imported>& imports() {
  static auto& the = *new std::map<std::string, Imported>;
  return the;
}

// Ends an export that nobody has imported. Returns false if somebody has.
bool end_export(const Exported& exported) {
  if (flock(exported.fd, LOCK_EX | LOCK_NB) != 0) return false;
  const Export ended{};
  (void)!pwrite(exported.fd, &ended, sizeof ended, 0);  // for who has just opened it
  close(exported.fd);
  return true;
}

int write_export(const PhysicalPtr& physical, size_t offset, size_t size, bool checks_pid,
                 Export* out) {
  *out = {};
  out->magic = kMagic;
  out->offset = physical->offset + offset;
  out->size = size;
  out->fd = physical->fd;
  out->device = physical->home;
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
// own. `lock` becomes a file that says that it is in use, until it is closed.
int import(int pid, int export_fd, const uint64_t* nonce, PhysicalPtr* out, int* lock) {
  Export found{};
  const int fd = open_file_of(pid, export_fd);
  const bool is_read = fd >= 0 && flock(fd, LOCK_SH | LOCK_NB) == 0 &&
                       pread(fd, &found, sizeof found, 0) == static_cast<ssize_t>(sizeof found);
  const auto refuse = [fd](int code) {
    if (fd >= 0) close(fd);
    return code;
  };
  if (!is_read || found.magic != kMagic || (nonce != nullptr && *nonce != found.nonce)) {
    return refuse(fail(ACL_ERROR_RT_INVALID_HANDLE,
                       "nothing is exported under this name (any more) by process %d", pid));
  }
  const int us = sim::bare_tgid();
  int32_t* const end = found.pids + std::clamp<int32_t>(found.pid_count, 0, kMaxPids);
  if (found.checks_pid != 0 && pid != getpid() && std::find(found.pids, end, us) == end) {
    return refuse(fail(ACL_ERROR_RT_NO_PERMISSION,
                       "process %d did not allow process %d (of aclrtDeviceGetBareTgid) to import",
                       pid, us));
  }
  const int memory = open_file_of(pid, found.fd);
  if (memory < 0) {
    return refuse(
        fail(ACL_ERROR_RT_IPC_ERROR, "the memory of process %d can't be opened: %m", pid));
  }
  *out = std::make_shared<sim::Physical>(std::max(ascend_sim_current_device(), 0), memory,
                                         found.offset, found.size, false);
  (*out)->is_fresh = false;
  (*out)->home = found.device;
  *lock = fd;
  return 0;
}

int allow(int fd, const int32_t* pids, size_t count) {
  Export found{};
  if (pread(fd, &found, sizeof found, 0) != static_cast<ssize_t>(sizeof found)) {
    return fail(ACL_ERROR_RT_IPC_ERROR, "the export can't be read: %m");
  }
  if (count == 0 || pids == nullptr) return fail(ACL_ERROR_RT_PARAM_INVALID, "no processes");
  if (count > kMaxPids - found.pid_count)
    return fail(ACL_ERROR_RT_OVER_LIMIT, "more than %zu processes", kMaxPids);
  std::copy_n(pids, count, found.pids + found.pid_count);
  found.pid_count += static_cast<int32_t>(count);
  if (pwrite(fd, &found, sizeof found, 0) == static_cast<ssize_t>(sizeof found)) return 0;
  return fail(ACL_ERROR_RT_IPC_ERROR, "the export can't be written: %m");
}

}  // namespace

bool sim::end_exports(uintptr_t start) {
  std::lock_guard<std::mutex> lock(mutex);
  for (auto at = exports().begin(); at != exports().end();) {
    if (at->second.start != start) {
      ++at;
    } else if (!end_export(at->second)) {
      return false;
    } else {
      at = exports().erase(at);
    }
  }
  return true;
}

aclError aclrtIpcMemGetExportKey(void* address, size_t size, char* key, size_t length,
                                 uint64_t flags) {
  ASCEND_SIM_ENTER(aclrtIpcMemGetExportKey);
  sim::Range range;
  const uintptr_t start = to_int(address);
  if (key == nullptr || length != kKeyBytes ||
      (flags & ~uint64_t{ACL_RT_IPC_MEM_EXPORT_FLAG_DISABLE_PID_VALIDATION}) != 0) {
    return fail(ACL_ERROR_RT_PARAM_INVALID, "a key has %zu bytes, not %zu; or flags=%" PRIu64,
                kKeyBytes, length, flags);
  }
  if (!sim::is_device_address(start) || !sim::find_range(start, &range) || range.start != start ||
      range.size != size) {
    return fail(ACL_ERROR_RT_PARAM_INVALID,
                "%p: %zu bytes are no whole allocation, which alone can be exported", address,
                size);
  }
  if (range.physical->is_apart || range.physical->is_imported()) {
    return fail(ACL_ERROR_RT_FEATURE_NOT_SUPPORT,
                "%p: memory that aclrtMalloc did not give can't be exported by a key", address);
  }
  if (ascend_sim_current_device() != range.device) {
    return fail(ACL_ERROR_RT_CONTEXT_NULL, "%p: memory of device %d, which isn't the current one",
                address, range.device);
  }
  Export content;
  const bool checks_pid = flags == 0;
  const int fd = write_export(range.physical, range.offset, size, checks_pid, &content);
  if (fd < 0) return fail(ACL_ERROR_RT_IPC_ERROR, "no file for the key: %m");
  std::memset(key, 0, length);
  std::snprintf(key, kKeyBytes, "ascend-sim:%d:%d:%016" PRIx64, getpid(), fd, content.nonce);
  std::lock_guard<std::mutex> lock(mutex);
  exports()[key] = {fd, start};
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

aclError aclrtIpcMemImportByKey(void** out, const char* key, uint64_t flags) {
  ASCEND_SIM_ENTER(aclrtIpcMemImportByKey);
  const int device = ascend_sim_current_device();
  if (device < 0) return fail(ACL_ERROR_RT_CONTEXT_NULL, "this thread has set no device");
  if (out == nullptr || key == nullptr ||
      (flags & ~uint64_t{ACL_RT_IPC_MEM_IMPORT_FLAG_ENABLE_PEER_ACCESS}) != 0) {
    return fail(ACL_ERROR_RT_PARAM_INVALID, "no key, or flags=%" PRIu64, flags);
  }
  int pid = 0;
  int fd = 0;
  uint64_t nonce = 0;
  if (std::sscanf(key, "ascend-sim:%d:%d:%16" SCNx64, &pid, &fd, &nonce) != 3) {
    return fail(ACL_ERROR_RT_PARAM_INVALID, "not a key");
  }
  std::lock_guard<std::mutex> lock(mutex);
  if (pid == getpid() || imports().count(key) != 0) {
    return fail(ACL_ERROR_RT_PARAM_INVALID, "%s: this process has exported or imported it", key);
  }
  PhysicalPtr physical;
  int in_use = -1;
  if (const int code = import(pid, fd, &nonce, &physical, &in_use); code != 0) return code;
  const uintptr_t start = sim::reserve_addresses(physical->size, sim::kHugePage);
  if (start == 0 || !sim::map_physical(start, physical->size, physical, 0)) {
    close(in_use);
    return fail(ACL_ERROR_RT_MEMORY_ALLOCATION, "no addresses for %zu bytes", physical->size);
  }
  if (flags != 0) sim::enable_peer(device, physical->home);
  imports()[key] = {in_use, start};
  *out = sim::to_pointer(start);
  return 0;
}

aclError aclrtIpcMemClose(const char* key) {
  ASCEND_SIM_ENTER(aclrtIpcMemClose);
  if (key == nullptr) return fail(ACL_ERROR_RT_PARAM_INVALID, "no key");
  std::lock_guard<std::mutex> lock(mutex);
  if (const auto found = imports().find(key); found != imports().end()) {
    sim::release_addresses(found->second.start);
    close(found->second.fd);
    imports().erase(found);
    return 0;
  }
  const auto found = exports().find(key);
  if (found == exports().end()) return fail(ACL_ERROR_RT_INVALID_HANDLE, "no such key");
  if (!end_export(found->second)) {
    return fail(ACL_ERROR_RT_IPC_ERROR, "%s: closed here before who imported it has closed it",
                key);
  }
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
  int in_use = -1;
  const int pid = static_cast<int>(shared >> 32);
  const int fd = static_cast<int>(shared & UINT32_MAX);
  if (const int code = import(pid, fd, nullptr, &physical, &in_use); code != 0) return code;
  close(in_use);
  physical->is_apart = true;
  *out = sim::add_handle(physical);
  return 0;
}
