// SPDX-License-Identifier: Apache-2.0
// Devices, contexts, and what the machine says about itself.
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <map>
#include <mutex>
#include <set>
#include <string>
#include <utility>

#include "../sim_api.h"
#include "acl/acl.h"
#include "errors.h"
#include "faults.h"
#include "memory.h"
#include "peers.h"
#include "settings.h"
#include "streams.h"

using sim::fail;

namespace {

constexpr int kCubeCores = 24;
constexpr int kVectorCores = 48;
constexpr int64_t kL2Bytes = int64_t{192} << 20;
constexpr const char* kCannVersion = "8.5.0";
constexpr const char* kDriverVersion = "25.5.0";

thread_local int current_device = -1;

std::mutex contexts_mutex;

// A context's handle -> its device. Handles of default contexts are made with the first use of
// their device.
std::map<void*, int>& contexts() {
  static std::map<void*, int>& the = *new std::map<void*, int>;
  return the;
}

void* default_context(int device) {
  static std::map<int, char>& handles = *new std::map<int, char>;
  std::lock_guard<std::mutex> lock(contexts_mutex);
  void* handle = &handles[device];
  contexts()[handle] = device;
  return handle;
}

// (device, peer): who may reach whose memory, as this process has enabled it.
std::mutex peers_mutex;

std::set<std::pair<int, int>>& peers() {
  static auto& the = *new std::set<std::pair<int, int>>;
  return the;
}

// The host sees a process in a container under another number than the process itself.
constexpr int kBareTgidOffset = 1 << 22;

int check_device(int device) {
  if (device >= 0 && device < sim::settings().devices) return 0;
  return fail(ACL_ERROR_RT_INVALID_DEVICEID, "there is no device %d, only %d", device,
              sim::settings().devices);
}

}  // namespace

namespace sim {

void enable_peer(int device, int peer) {
  std::lock_guard<std::mutex> lock(peers_mutex);
  peers().insert({device, peer});
}

bool is_peer_enabled(int device, int peer) {
  std::lock_guard<std::mutex> lock(peers_mutex);
  return device == peer || peers().count({device, peer}) != 0;
}

int bare_tgid() { return getpid() + kBareTgidOffset; }

}  // namespace sim

int ascend_sim_current_device(void) { return current_device; }

aclError aclInit(const char*) {
  ASCEND_SIM_ENTER(aclInit);
  static bool is_done = false;
  if (is_done) return fail(ACL_ERROR_REPEAT_INITIALIZE, "aclInit was called before");
  is_done = true;
  return 0;
}

aclError aclFinalize() {
  ASCEND_SIM_ENTER(aclFinalize);
  return 0;
}

aclError aclrtGetDeviceCount(uint32_t* count) {
  ASCEND_SIM_ENTER(aclrtGetDeviceCount);
  *count = static_cast<uint32_t>(sim::settings().devices);
  return 0;
}

aclError aclrtSetDevice(int32_t device) {
  ASCEND_SIM_ENTER(aclrtSetDevice);
  if (const int code = check_device(device); code != 0) return code;
  if (sim::is_away(device)) {
    return fail(ACL_ERROR_RT_LOST_HEARTBEAT, "device %d was taken away by fault injection", device);
  }
  current_device = device;
  return 0;
}

aclError aclrtGetDevice(int32_t* device) {
  ASCEND_SIM_ENTER(aclrtGetDevice);
  if (current_device < 0) return fail(ACL_ERROR_RT_CONTEXT_NULL, "this thread has set no device");
  *device = current_device;
  return 0;
}

aclError aclrtResetDevice(int32_t device) {
  ASCEND_SIM_ENTER(aclrtResetDevice);
  if (const int code = check_device(device); code != 0) return code;
  sim::finish_device(device);
  if (current_device == device) current_device = -1;
  return 0;
}

aclError aclrtResetDeviceForce(int32_t device) {
  ASCEND_SIM_ENTER(aclrtResetDeviceForce);
  return aclrtResetDevice(device);
}

aclError aclrtSynchronizeDeviceWithTimeout(int32_t timeout) {
  ASCEND_SIM_ENTER(aclrtSynchronizeDeviceWithTimeout);
  if (current_device < 0) return fail(ACL_ERROR_RT_CONTEXT_NULL, "this thread has set no device");
  if (!sim::finish_device(current_device, sim::deadline_from(timeout))) {
    return fail(ACL_ERROR_RT_STREAM_SYNC_TIMEOUT, "device %d has not finished in %d ms",
                current_device, timeout);
  }
  return sim::take_device_error(current_device);
}

aclError aclrtSynchronizeDevice(void) {
  ASCEND_SIM_ENTER(aclrtSynchronizeDevice);
  return aclrtSynchronizeDeviceWithTimeout(-1);
}

aclError aclrtCreateContext(aclrtContext* context, int32_t device) {
  ASCEND_SIM_ENTER(aclrtCreateContext);
  if (const int code = check_device(device); code != 0) return code;
  std::lock_guard<std::mutex> lock(contexts_mutex);
  *context = new char;
  contexts()[*context] = device;
  current_device = device;
  return 0;
}

aclError aclrtDestroyContext(aclrtContext context) {
  ASCEND_SIM_ENTER(aclrtDestroyContext);
  std::lock_guard<std::mutex> lock(contexts_mutex);
  // The handle isn't freed: another thread may have it, and an address must not mean two contexts.
  if (contexts().erase(context) == 0) return fail(ACL_ERROR_RT_INVALID_HANDLE, "no such context");
  return 0;
}

aclError aclrtSetCurrentContext(aclrtContext context) {
  ASCEND_SIM_ENTER(aclrtSetCurrentContext);
  std::lock_guard<std::mutex> lock(contexts_mutex);
  const auto found = contexts().find(context);
  if (found == contexts().end()) return fail(ACL_ERROR_RT_INVALID_HANDLE, "no such context");
  current_device = found->second;
  return 0;
}

aclError aclrtGetCurrentContext(aclrtContext* context) {
  ASCEND_SIM_ENTER(aclrtGetCurrentContext);
  if (current_device < 0) return fail(ACL_ERROR_RT_CONTEXT_NULL, "this thread has set no device");
  *context = default_context(current_device);
  return 0;
}

aclError aclrtCtxGetCurrentDefaultStream(aclrtStream* stream) {
  ASCEND_SIM_ENTER(aclrtCtxGetCurrentDefaultStream);
  if (current_device < 0) return fail(ACL_ERROR_RT_CONTEXT_NULL, "this thread has set no device");
  *stream = nullptr;
  return 0;
}

aclError aclrtGetPrimaryCtxState(int32_t device, uint32_t* flags, int32_t* active) {
  ASCEND_SIM_ENTER(aclrtGetPrimaryCtxState);
  if (const int code = check_device(device); code != 0) return code;
  if (flags != nullptr) *flags = 0;
  *active = 1;
  return 0;
}

aclError aclrtGetRunMode(aclrtRunMode* mode) {
  ASCEND_SIM_ENTER(aclrtGetRunMode);
  *mode = ACL_HOST;
  return 0;
}

aclError aclrtQueryDeviceStatus(int32_t device, aclrtDeviceStatus* status) {
  ASCEND_SIM_ENTER(aclrtQueryDeviceStatus);
  if (const int code = check_device(device); code != 0) return code;
  *status = sim::is_away(device) ? ACL_RT_DEVICE_STATUS_ABNORMAL : ACL_RT_DEVICE_STATUS_NORMAL;
  return 0;
}

aclError aclrtDeviceCanAccessPeer(int32_t* can, int32_t device, int32_t peer) {
  ASCEND_SIM_ENTER(aclrtDeviceCanAccessPeer);
  if (const int code = check_device(device); code != 0) return code;
  if (const int code = check_device(peer); code != 0) return code;
  *can = device != peer;
  return 0;
}

aclError aclrtDeviceEnablePeerAccess(int32_t peer, uint32_t flags) {
  ASCEND_SIM_ENTER(aclrtDeviceEnablePeerAccess);
  if (current_device < 0) return fail(ACL_ERROR_RT_CONTEXT_NULL, "this thread has set no device");
  if (const int code = check_device(peer); code != 0) return code;
  if (peer == current_device || flags != 0) {
    return fail(ACL_ERROR_RT_PARAM_INVALID, "device %d is the current one, or flags=%u", peer,
                flags);
  }
  sim::enable_peer(current_device, peer);
  return 0;
}

aclError aclrtDeviceDisablePeerAccess(int32_t peer) {
  ASCEND_SIM_ENTER(aclrtDeviceDisablePeerAccess);
  if (const int code = check_device(peer); code != 0) return code;
  std::lock_guard<std::mutex> lock(peers_mutex);
  peers().erase({current_device, peer});
  return 0;
}

aclError aclrtDeviceGetBareTgid(int32_t* pid) {
  ASCEND_SIM_ENTER(aclrtDeviceGetBareTgid);
  *pid = sim::bare_tgid();
  return 0;
}

aclError aclrtDeviceGetUuid(int32_t device, aclrtUuid* uuid) {
  ASCEND_SIM_ENTER(aclrtDeviceGetUuid);
  if (const int code = check_device(device); code != 0) return code;
  *uuid = {};
  std::snprintf(uuid->bytes, sizeof uuid->bytes, "ascend-sim-%d", device);
  return 0;
}

const char* aclrtGetSocName() { return sim::settings().soc.c_str(); }

aclError aclGetDeviceCapability(uint32_t device, aclDeviceInfo info, int64_t* value) {
  ASCEND_SIM_ENTER(aclGetDeviceCapability);
  if (const int code = check_device(static_cast<int>(device)); code != 0) return code;
  switch (info) {
    case ACL_DEVICE_INFO_AI_CORE_NUM:
      *value = kCubeCores;
      return 0;
    case ACL_DEVICE_INFO_VECTOR_CORE_NUM:
      *value = kVectorCores;
      return 0;
    case ACL_DEVICE_INFO_L2_SIZE:
      *value = kL2Bytes;
      return 0;
    default:
      return fail(ACL_ERROR_INVALID_PARAM, "device info %d isn't simulated", info);
  }
}

aclError aclrtGetDeviceInfo(uint32_t device, aclrtDevAttr attribute, int64_t* value) {
  ASCEND_SIM_ENTER(aclrtGetDeviceInfo);
  if (const int code = check_device(static_cast<int>(device)); code != 0) return code;
  switch (attribute) {
    case ACL_DEV_ATTR_AICORE_CORE_NUM:
    case ACL_DEV_ATTR_CUBE_CORE_NUM:
      *value = kCubeCores;
      return 0;
    case ACL_DEV_ATTR_VECTOR_CORE_NUM:
      *value = kVectorCores;
      return 0;
    case ACL_DEV_ATTR_AICPU_CORE_NUM:
      *value = 6;
      return 0;
    case ACL_DEV_ATTR_TOTAL_GLOBAL_MEM_SIZE:
      *value = static_cast<int64_t>(sim::settings().memory);
      return 0;
    case ACL_DEV_ATTR_L2_CACHE_SIZE:
      *value = kL2Bytes;
      return 0;
    case ACL_DEV_ATTR_PHY_CHIP_ID:
      *value = device;
      return 0;
    case ACL_DEV_ATTR_SMP_ID:
    case ACL_DEV_ATTR_IS_VIRTUAL:
      *value = 0;
      return 0;
    default:
      return fail(ACL_ERROR_RT_FEATURE_NOT_SUPPORT, "device attribute %d isn't simulated",
                  attribute);
  }
}

aclError aclsysGetCANNVersion(aclCANNPackageName name, aclCANNPackageVersion* version) {
  ASCEND_SIM_ENTER(aclsysGetCANNVersion);
  std::memset(version, 0, sizeof *version);
  std::strcpy(version->version, name == ACL_PKG_NAME_DRIVER ? kDriverVersion : kCannVersion);
  int parts[3] = {0, 0, 0};
  std::sscanf(version->version, "%d.%d.%d", &parts[0], &parts[1], &parts[2]);
  char* const fields[3] = {version->majorVersion, version->minorVersion, version->releaseVersion};
  for (int i = 0; i < 3; ++i)
    std::snprintf(fields[i], ACL_PKG_VERSION_PARTS_MAX_SIZE, "%d", parts[i]);
  return 0;
}

aclError aclsysGetVersionStr(char* package, char* version) {
  ASCEND_SIM_ENTER(aclsysGetVersionStr);
  std::strcpy(version, std::strcmp(package, "driver") == 0 ? kDriverVersion : kCannVersion);
  return 0;
}

aclError aclGetCannAttributeList(const aclCannAttr** list, size_t* count) {
  ASCEND_SIM_ENTER(aclGetCannAttributeList);
  static const aclCannAttr known[] = {ACL_CANN_ATTR_INF_NAN, ACL_CANN_ATTR_BF16,
                                      ACL_CANN_ATTR_JIT_COMPILE};
  *list = known;
  *count = 3;
  return 0;
}

aclError aclGetCannAttribute(aclCannAttr attribute, int32_t* value) {
  ASCEND_SIM_ENTER(aclGetCannAttribute);
  *value = attribute == ACL_CANN_ATTR_INF_NAN || attribute == ACL_CANN_ATTR_BF16 ? 1 : 0;
  return 0;
}

aclError aclrtGetMemInfo(aclrtMemAttr, size_t* free, size_t* total) {
  ASCEND_SIM_ENTER(aclrtGetMemInfo);
  // torch_npu asks for the properties of device 0 before it has set a device.
  *total = sim::settings().memory;
  *free = *total - sim::used_bytes(std::max(current_device, 0));
  return 0;
}
