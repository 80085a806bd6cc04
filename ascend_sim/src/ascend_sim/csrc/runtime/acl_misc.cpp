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

aclError aclrtBinaryGetFunctionByEntry(aclrtBinHandle, uint64_t, aclrtFuncHandle*) {
  ASCEND_SIM_ENTER(aclrtBinaryGetFunctionByEntry);
  return no_binaries("aclrtBinaryGetFunctionByEntry");
}

aclError aclrtBinaryUnLoad(aclrtBinHandle) {
  ASCEND_SIM_ENTER(aclrtBinaryUnLoad);
  return no_binaries("aclrtBinaryUnLoad");
}

aclError aclrtLaunchKernelWithHostArgs(aclrtFuncHandle, uint32_t, aclrtStream,
                                       aclrtLaunchKernelCfg*, void*, size_t, aclrtPlaceHolderInfo*,
                                       size_t) {
  ASCEND_SIM_ENTER(aclrtLaunchKernelWithHostArgs);
  return no_binaries("aclrtLaunchKernelWithHostArgs");
}

aclError aclrtGetHardwareSyncAddr(void**) {
  ASCEND_SIM_ENTER(aclrtGetHardwareSyncAddr);
  return no_binaries("aclrtGetHardwareSyncAddr");
}

// Nothing here destroys a stream by itself, so that nobody needs to be told.
ASCEND_SIM_ACCEPT(aclrtRegStreamStateCallback, const char*, aclrtStreamStateCallback, void*)

size_t aclDataTypeSize(aclDataType type) {
  switch (type) {
    case ACL_INT8:
    case ACL_UINT8:
    case ACL_BOOL:
    case ACL_HIFLOAT8:
    case ACL_FLOAT8_E5M2:
    case ACL_FLOAT8_E4M3FN:
    case ACL_FLOAT8_E8M0:
      return 1;
    case ACL_FLOAT16:
    case ACL_BF16:
    case ACL_INT16:
    case ACL_UINT16:
      return 2;
    case ACL_FLOAT:
    case ACL_INT32:
    case ACL_UINT32:
    case ACL_COMPLEX32:
      return 4;
    case ACL_DOUBLE:
    case ACL_INT64:
    case ACL_UINT64:
    case ACL_COMPLEX64:
      return 8;
    case ACL_COMPLEX128:
      return 16;
    default:
      return 0;
  }
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
