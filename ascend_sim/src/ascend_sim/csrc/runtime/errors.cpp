// SPDX-License-Identifier: Apache-2.0
#include "errors.h"

#include <array>
#include <cstdarg>
#include <cstdio>
#include <string>

#include "../sim_api.h"
#include "acl/acl.h"

namespace sim {
namespace {

// Callers keep the pointer that aclGetRecentErrMsg returned while further calls fail.
constexpr size_t kKept = 16;

struct Recent {
  std::array<std::string, kKept> texts;
  size_t at = 0;
  int code = 0;
};
thread_local Recent recent;

void note(int code, const char* format, va_list arguments) {
  char text[1024];
  std::vsnprintf(text, sizeof text, format, arguments);
  recent.at = (recent.at + 1) % kKept;
  recent.texts[recent.at] = "[simulated Ascend runtime] " + std::to_string(code) + ": " + text;
  recent.code = code;
}

}  // namespace

int fail(int code, const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  note(code, format, arguments);
  va_end(arguments);
  return code;
}

}  // namespace sim

void ascend_sim_fail(int code, const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  sim::note(code, format, arguments);
  va_end(arguments);
}

const char* aclGetRecentErrMsg() { return sim::recent.texts[sim::recent.at].c_str(); }

aclError aclrtPeekAtLastError(aclrtLastErrLevel) { return sim::recent.code; }

aclError aclrtGetLastError(aclrtLastErrLevel) {
  const int code = sim::recent.code;
  sim::recent.code = 0;
  return code;
}
