// SPDX-License-Identifier: Apache-2.0
// libacl_op_compiler: the way to operators that have no aclnn kernel. The simulator has no graph
// compiler, so it says that there is no such operator, on the thread that asks, before torch_npu
// has queued anything.
#include "acl/acl_op_compiler.h"

#include <atomic>
#include <cstdio>
#include <cstring>

#include "acl/acl_op.h"

namespace {

const char* option_of(aclCompileOpt option) {
  // With JIT compilation enabled torch_npu would send every operator to the graph compiler.
  return option == ACL_OP_JIT_COMPILE ? "disable" : "";
}

constexpr int kOptions = 3;
std::atomic<int64_t> options[kOptions];

}  // namespace

// torch_npu looks for these here.
aclError aclrtSetSysParamOpt(aclSysParamOpt option, int64_t value) {
  const int index = static_cast<int>(option);
  if (index < 0 || index >= kOptions) return ACL_ERROR_INVALID_PARAM;
  options[index] = value;
  return 0;
}

aclError aclrtCtxSetSysParamOpt(aclSysParamOpt option, int64_t value) {
  return aclrtSetSysParamOpt(option, value);
}

aclError aclrtGetSysParamOpt(aclSysParamOpt option, int64_t* value) {
  const int index = static_cast<int>(option);
  if (index < 0 || index >= kOptions) return ACL_ERROR_INVALID_PARAM;
  *value = options[index];
  return 0;
}

aclError aclSetCompileopt(aclCompileOpt, const char*) { return 0; }

size_t aclGetCompileoptSize(aclCompileOpt option) { return std::strlen(option_of(option)) + 1; }

aclError aclGetCompileopt(aclCompileOpt option, char* value, size_t length) {
  std::snprintf(value, length, "%s", option_of(option));
  return 0;
}

aclError aclopCompileAndExecute(const char*, int, const aclTensorDesc* const[],
                                const aclDataBuffer* const[], int, const aclTensorDesc* const[],
                                aclDataBuffer* const[], const aclopAttr*, aclopEngineType,
                                aclopCompileType, const char*, aclrtStream) {
  return ACL_ERROR_OP_NOT_FOUND;
}
