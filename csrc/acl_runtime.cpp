// SPDX-License-Identifier: Apache-2.0

#include "acl_runtime.h"

#include <dlfcn.h>

#include <atomic>
#include <utility>

namespace llmdd {
namespace {

constexpr const char* kLibrary = "libascendcl.so";

template <typename Function>
void find(void* library, const char* name, Function& function) {
  function = reinterpret_cast<Function>(dlsym(library, name));
}

template <typename Function>
void require(void* library, const char* name, Function& function) {
  find(library, name, function);
  if (function == nullptr) {
    throw AclMissing(std::string(kLibrary) + " of this process has no " + name);
  }
}

AclRuntime load() {
  // Not loaded by us: a second runtime beside torch_npu's would know nothing of its streams.
  void* library = dlopen(kLibrary, RTLD_NOW | RTLD_NOLOAD);
  if (library == nullptr) {
    throw AclMissing(std::string(kLibrary) + " is not loaded in this process");
  }
  AclRuntime acl{};
  require(library, "aclrtGetDevice", acl.get_device);
  require(library, "aclrtSetDevice", acl.set_device);
  require(library, "aclrtMemcpyAsync", acl.memcpy_async);
  require(library, "aclrtSynchronizeStream", acl.synchronize_stream);
  require(library, "aclGetRecentErrMsg", acl.recent_message);
  require(library, "aclrtDeviceEnablePeerAccess", acl.enable_peer_access);
  find(library, "aclrtMemcpyBatchAsync", acl.memcpy_batch_async);
  find(library, "aclrtPointerGetAttributes", acl.pointer_attributes);
  return acl;
}

}  // namespace

AclError::AclError(std::string call, int code, std::string detail)
    : std::runtime_error(call + " failed with " + std::to_string(code) +
                         (detail.empty() ? "" : ": " + detail)),
      call_(std::move(call)),
      code_(code),
      detail_(std::move(detail)) {}

void AclRuntime::check(const char* call, int code) const {
  if (code != 0) {
    const char* detail = recent_message();
    throw AclError(call, code, detail == nullptr ? "" : detail);
  }
}

void AclRuntime::use_device(int32_t device) const {
  // A thread that torch_npu has only queued work from has no context of its own.
  int32_t current = -1;
  if (get_device(&current) != 0 || current != device) {
    check("aclrtSetDevice", set_device(device));
  }
}

const AclRuntime& acl_runtime() {
  // Kept once found, and for ever: the library stays loaded, as we hold a reference to it. Not
  // finding it is no lasting answer, since torch_npu may be imported later.
  static std::atomic<const AclRuntime*> found{nullptr};
  const AclRuntime* runtime = found.load(std::memory_order_acquire);
  if (runtime == nullptr) {
    const AclRuntime* fresh = new AclRuntime(load());
    if (found.compare_exchange_strong(runtime, fresh, std::memory_order_acq_rel)) {
      runtime = fresh;
    } else {
      delete fresh;
    }
  }
  return *runtime;
}

}  // namespace llmdd
