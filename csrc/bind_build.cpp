// SPDX-License-Identifier: Apache-2.0
// What this library was built of, and by what. LLMDD_VERSION and LLMDD_COMMIT come from setup.py.

#include <string>
#include <utility>
#include <vector>

#include "bindings.h"

#define LLMDD_QUOTED(text) #text
#define LLMDD_TEXT(macro) LLMDD_QUOTED(macro)

namespace llmdd {
namespace {

#ifdef _LIBCPP_VERSION
constexpr const char* kCxxLibrary = "libc++ " LLMDD_TEXT(_LIBCPP_VERSION);
#else
constexpr const char* kCxxLibrary = "libstdc++ " LLMDD_TEXT(_GLIBCXX_RELEASE);
#endif

std::vector<std::pair<std::string, std::string>> build_facts() {
  return {{"version", LLMDD_VERSION},
          {"commit", LLMDD_COMMIT},
          {"compiler", __VERSION__},
          {"C++ library", kCxxLibrary},
          {"glibc", LLMDD_TEXT(__GLIBC__) "." LLMDD_TEXT(__GLIBC_MINOR__)},
          {"Python's limited API", LLMDD_TEXT(Py_LIMITED_API)}};
}

}  // namespace

void bind_build(Module& module) {
  module.function<&build_facts>("build_facts", {}, "What this library was built of, and by what.");
}

}  // namespace llmdd
