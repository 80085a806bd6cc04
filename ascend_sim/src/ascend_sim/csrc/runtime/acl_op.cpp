// SPDX-License-Identifier: Apache-2.0
// The descriptions of tensors and attributes for operators without an aclnn kernel.
#include "acl/acl_op.h"

#include <cxxabi.h>
#include <dlfcn.h>
#include <execinfo.h>

#include <cstdlib>
#include <memory>
#include <stdexcept>
#include <string>

namespace {

// The innermost torch operator on this thread's stack. A description of a tensor doesn't say whose
// it is, but torch calls every operator by a function named after it: at::_ops::NAME::call.
std::string calling_operator() {
  constexpr int kFrames = 100;
  const std::string prefix = "at::_ops::";
  void* frames[kFrames];
  const int depth = backtrace(frames, kFrames);
  for (int i = 0; i < depth; ++i) {
    Dl_info symbol;
    if (dladdr(frames[i], &symbol) == 0 || symbol.dli_sname == nullptr) continue;
    const std::unique_ptr<char, void (*)(void*)> readable(
        abi::__cxa_demangle(symbol.dli_sname, nullptr, nullptr, nullptr), std::free);
    if (readable == nullptr) continue;
    const std::string name = readable.get();
    if (name.rfind(prefix, 0) != 0) continue;
    return "aten::" + name.substr(prefix.size(), name.find("::", prefix.size()) - prefix.size());
  }
  return "an operator";
}

}  // namespace

aclTensorDesc* aclCreateTensorDesc(aclDataType, int, const int64_t*, aclFormat) {
  // A null pointer would make torch_npu drop all later tasks without a word.
  throw std::runtime_error("the simulated Ascend runtime has no kernel for " + calling_operator());
}
void aclDestroyTensorDesc(const aclTensorDesc*) {}
aclDataType aclGetTensorDescType(const aclTensorDesc*) { return ACL_DT_UNDEFINED; }
aclFormat aclGetTensorDescFormat(const aclTensorDesc*) { return ACL_FORMAT_UNDEFINED; }
size_t aclGetTensorDescNumDims(const aclTensorDesc*) { return 0; }
aclError aclGetTensorDescDimV2(const aclTensorDesc*, size_t, int64_t*) {
  return ACL_ERROR_INVALID_PARAM;
}
void aclSetTensorDescName(aclTensorDesc*, const char*) {}
aclError aclSetTensorFormat(aclTensorDesc*, aclFormat) { return 0; }
aclError aclSetTensorPlaceMent(aclTensorDesc*, aclMemType) { return 0; }
aclError aclSetTensorShape(aclTensorDesc*, int, const int64_t*) { return 0; }

aclDataBuffer* aclCreateDataBuffer(void*, size_t) {
  return reinterpret_cast<aclDataBuffer*>(new char);
}
aclError aclDestroyDataBuffer(const aclDataBuffer* buffer) {
  delete reinterpret_cast<const char*>(buffer);
  return 0;
}

aclopAttr* aclopCreateAttr() { return reinterpret_cast<aclopAttr*>(new char); }
void aclopDestroyAttr(const aclopAttr* attributes) {
  delete reinterpret_cast<const char*>(attributes);
}
aclError aclopSetAttrBool(aclopAttr*, const char*, uint8_t) { return 0; }
aclError aclopSetAttrInt(aclopAttr*, const char*, int64_t) { return 0; }
aclError aclopSetAttrFloat(aclopAttr*, const char*, float) { return 0; }
aclError aclopSetAttrString(aclopAttr*, const char*, const char*) { return 0; }
aclError aclopSetAttrDataType(aclopAttr*, const char*, aclDataType) { return 0; }
aclError aclopSetAttrListBool(aclopAttr*, const char*, int, const uint8_t*) { return 0; }
aclError aclopSetAttrListInt(aclopAttr*, const char*, int, const int64_t*) { return 0; }
aclError aclopSetAttrListFloat(aclopAttr*, const char*, int, const float*) { return 0; }
aclError aclopSetAttrListListInt(aclopAttr*, const char*, int, const int*, const int64_t* const[]) {
  return 0;
}
