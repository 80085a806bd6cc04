// SPDX-License-Identifier: Apache-2.0
// What torch_npu needs to find, and what needs nothing done here: options, dumps, profiling,
// kernels in binary form.
#include <chrono>

#include "acl/acl.h"
#include "acl/acl_dump.h"
#include "errors.h"
#include "faults.h"
#include "profiling/aprof_pub.h"

using sim::fail;

namespace {

int no_binaries(const char* function) {
  return fail(ACL_ERROR_RT_FEATURE_NOT_SUPPORT,
              "%s: kernels in binary form can't run on the simulator", function);
}

}  // namespace

#define ASCEND_SIM_ACCEPT(function, ...) \
  aclError function(__VA_ARGS__) {       \
    ASCEND_SIM_ENTER(function);          \
    return 0;                            \
  }

ASCEND_SIM_ACCEPT(aclmdlInitDump)
ASCEND_SIM_ACCEPT(aclmdlSetDump, const char*)
ASCEND_SIM_ACCEPT(aclmdlFinalizeDump)
ASCEND_SIM_ACCEPT(aclrtSetDeviceSatMode, aclrtFloatOverflowMode)
ASCEND_SIM_ACCEPT(aclrtSetOpExecuteTimeOut, uint32_t)
ASCEND_SIM_ACCEPT(aclrtSetOpWaitTimeout, uint32_t)
ASCEND_SIM_ACCEPT(aclrtSetStreamOverflowSwitch, aclrtStream, uint32_t)

aclError aclrtSetOpExecuteTimeOutV2(uint64_t timeout, uint64_t* actual) {
  ASCEND_SIM_ENTER(aclrtSetOpExecuteTimeOutV2);
  *actual = timeout;
  return 0;
}

aclError aclrtBinaryLoadFromData(const void*, size_t, const aclrtBinaryLoadOptions*,
                                 aclrtBinHandle*) {
  ASCEND_SIM_ENTER(aclrtBinaryLoadFromData);
  return no_binaries("aclrtBinaryLoadFromData");
}

aclError aclrtBinaryGetFunction(const aclrtBinHandle, const char*, aclrtFuncHandle*) {
  ASCEND_SIM_ENTER(aclrtBinaryGetFunction);
  return no_binaries("aclrtBinaryGetFunction");
}

aclError aclrtGetFunctionAddr(aclrtFuncHandle, void**, void**) {
  ASCEND_SIM_ENTER(aclrtGetFunctionAddr);
  return no_binaries("aclrtGetFunctionAddr");
}

void aclAppLog(aclLogLevel, const char*, const char*, uint32_t, const char*, ...) {}

// The runtime's own interface below AscendCL. Its headers don't come with torch_npu, and nothing
// here calls these.
extern "C" {
__attribute__((visibility("default"))) int rtDevBinaryRegister(const void*, void**) {
  return no_binaries("rtDevBinaryRegister");
}
__attribute__((visibility("default"))) int rtFunctionRegister(void*, const void*, const char*,
                                                              const void*, unsigned) {
  return no_binaries("rtFunctionRegister");
}
__attribute__((visibility("default"))) int rtKernelLaunch(const void*, unsigned, void*, unsigned,
                                                          void*, void*) {
  return no_binaries("rtKernelLaunch");
}
__attribute__((visibility("default"))) int rtGetC2cCtrlAddr(uint64_t*, unsigned*) {
  return no_binaries("rtGetC2cCtrlAddr");
}
}

int32_t MsprofRegisterCallback(uint32_t, ProfCommandHandle) { return 0; }
int32_t MsprofReportApi(uint32_t, const struct MsprofApi*) { return 0; }
int32_t MsprofReportCompactInfo(uint32_t, const VOID_PTR, uint32_t) { return 0; }
int32_t MsprofReportAdditionalInfo(uint32_t, const VOID_PTR, uint32_t) { return 0; }
uint64_t MsprofGetHashId(const char*, size_t) { return 0; }
uint64_t MsprofSysCycleTime(void) {
  return static_cast<uint64_t>(std::chrono::steady_clock::now().time_since_epoch().count());
}
