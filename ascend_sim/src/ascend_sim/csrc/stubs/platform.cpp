// SPDX-License-Identifier: Apache-2.0
// What extensions of torch_npu with kernels of their own in binary form (vllm-ascend's) name of
// CANN's libraries below AscendCL. Such kernels can't run here: these let the extension load, and
// say that there is no information about the chip. No headers of these libraries come with
// torch_npu; the names and types are those that the extension's symbols say.
#include <sys/syscall.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>

#define PLATFORM_EXPORT __attribute__((visibility("default")))

namespace fe {

enum class LocalMemType : int;

class PLATFORM_EXPORT PlatFormInfos {
 public:
  uint32_t GetCoreNum() const;
  void GetLocalMemBw(const LocalMemType& type, uint64_t& bandwidth);
  void GetLocalMemSize(const LocalMemType& type, uint64_t& nbytes);
  bool GetPlatformResWithLock(const std::string& label, const std::string& key, std::string& value);
  void SetCoreNumByCoreType(const std::string& type);
};

class PLATFORM_EXPORT PlatformInfoManager {
 public:
  static PlatformInfoManager& Instance();
  uint32_t InitRuntimePlatformInfos(const std::string& soc);
  uint32_t GetRuntimePlatformInfosByDevice(const uint32_t& device, PlatFormInfos& infos,
                                           bool needs_other);
};

constexpr uint32_t kFailed = 0xFFFFFFFF;

// Not 0, because tiling divides by it.
uint32_t PlatFormInfos::GetCoreNum() const { return 24; }
void PlatFormInfos::GetLocalMemBw(const LocalMemType&, uint64_t& bandwidth) { bandwidth = 0; }
void PlatFormInfos::GetLocalMemSize(const LocalMemType&, uint64_t& nbytes) { nbytes = 0; }
bool PlatFormInfos::GetPlatformResWithLock(const std::string&, const std::string&, std::string&) {
  return false;
}
void PlatFormInfos::SetCoreNumByCoreType(const std::string&) {}

PlatformInfoManager& PlatformInfoManager::Instance() {
  static PlatformInfoManager manager;
  return manager;
}
uint32_t PlatformInfoManager::InitRuntimePlatformInfos(const std::string&) { return kFailed; }
uint32_t PlatformInfoManager::GetRuntimePlatformInfosByDevice(const uint32_t&, PlatFormInfos&,
                                                              bool) {
  return kFailed;
}

}  // namespace fe

extern "C" {

// Whether a level of the log is on: none is.
PLATFORM_EXPORT int32_t CheckLogLevel(int32_t /*module*/, int32_t /*level*/) { return 0; }

PLATFORM_EXPORT uint64_t MsprofStr2Id(const char* /*text*/, size_t /*length*/) { return 0; }

PLATFORM_EXPORT int32_t mmGetTid(void) { return static_cast<int32_t>(syscall(SYS_gettid)); }

// The bounds-checked strcpy of C11's Annex K: 0, or an error, after which the target is "".
PLATFORM_EXPORT int32_t strcpy_s(char* target, size_t size, const char* source) {
  constexpr int32_t kInvalid = 22;
  constexpr int32_t kTooLong = 34;
  if (target == nullptr || size == 0) return kInvalid;
  target[0] = '\0';
  if (source == nullptr) return kInvalid;
  const size_t length = strnlen(source, size);
  if (length == size) return kTooLong;
  std::memcpy(target, source, length + 1);
  return 0;
}

PLATFORM_EXPORT int32_t rtFunctionGetMetaInfo(const void* /*function*/, int32_t /*type*/,
                                              void* /*data*/, uint32_t /*length*/) {
  return static_cast<int32_t>(fe::kFailed);
}
PLATFORM_EXPORT int32_t rtFunctionGetMetaInfoSize(const void* /*function*/, int32_t /*type*/,
                                                  uint32_t* /*length*/) {
  return static_cast<int32_t>(fe::kFailed);
}
}
