// SPDX-License-Identifier: Apache-2.0
// The few functions of AscendCL that copies need, found in the library that torch_npu has loaded.
// Nothing of CANN is needed to build, and nothing is loaded here. Torch-free.

#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

namespace llmdd {

// A call of AscendCL that failed, with its code and what aclGetRecentErrMsg said of it.
class AclError : public std::runtime_error {
 public:
  AclError(std::string call, int code, std::string detail);
  const std::string& call() const { return call_; }
  int code() const { return code_; }
  const std::string& detail() const { return detail_; }

 private:
  std::string call_;
  int code_;
  std::string detail_;
};

// There is no usable AscendCL in this process.
class AclMissing : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

constexpr int kAclInvalidParam = 107000;
constexpr int kAclNotSupported = 207000;

// How AscendCL numbers kinds of copies (aclrtMemcpyKind).
enum class CopyKind : int { kHostToDevice = 1, kDeviceToHost = 2, kDeviceToDevice = 3 };

// How it says where memory is (aclrtMemLocationType, aclrtMemLocation, aclrtPtrAttributes,
// aclrtMemcpyBatchAttr); sizes and order are its ABI.
enum class MemoryPlace : uint32_t { kHost = 0, kDevice = 1, kUnregistered = 2 };

struct MemoryLocation {
  uint32_t device = 0;
  MemoryPlace place = MemoryPlace::kHost;
};

struct PointerAttributes {
  MemoryLocation location;
  uint32_t page_size = 0;
  uint32_t reserved[4] = {};
};

struct BatchAttributes {
  MemoryLocation dst;
  MemoryLocation src;
  uint8_t reserved[16] = {};
};

struct AclRuntime {
  int (*get_device)(int32_t* device);
  int (*set_device)(int32_t device);
  int (*memcpy_async)(void* dst, size_t room, const void* src, size_t nbytes, int kind,
                      void* stream);
  int (*synchronize_stream)(void* stream);
  const char* (*recent_message)();
  int (*enable_peer_access)(int32_t peer, uint32_t flags);
  // Null where this version of the runtime does not have them.
  int (*memcpy_batch_async)(void** dsts, size_t* rooms, void** srcs, size_t* sizes, size_t count,
                            BatchAttributes* attributes, size_t* first_of, size_t num_attributes,
                            size_t* failed, void* stream);
  int (*pointer_attributes)(const void* address, PointerAttributes* attributes);

  // AclError unless `code` says success.
  void check(const char* call, int code) const;
  // Makes `device` the current one of this thread, which may have none yet.
  void use_device(int32_t device) const;
};

// The runtime of this process; AclMissing, with the remedy, if there is none.
const AclRuntime& acl_runtime();

}  // namespace llmdd
