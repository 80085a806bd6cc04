// SPDX-License-Identifier: Apache-2.0
#include "common.h"

#include <pthread.h>

#include <cstdarg>
#include <cstdio>
#include <fstream>
#include <sstream>

namespace ascend_sim::hixl {
namespace {

constexpr size_t kMaxLog = 64 << 10;

std::string& thread_log() {
  thread_local std::string text;
  return text;
}

void append(char level, const char* format, va_list arguments) {
  char text[1024];
  std::vsnprintf(text, sizeof text, format, arguments);
  std::string& all = thread_log();
  if (all.size() < kMaxLog) {
    all += level;
    all += text;
    all += '\n';
  }
}

}  // namespace

Limits& limits() {
  static Limits* const all = new Limits;
  return *all;
}

void log_error(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  append('E', format, arguments);
  va_end(arguments);
}

void log_warning(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  append('W', format, arguments);
  va_end(arguments);
}

std::string take_log() {
  std::string text;
  text.swap(thread_log());
  return text;
}

uint64_t start_time(int pid) {
  std::ifstream file("/proc/" + std::to_string(pid) + "/stat");
  std::string text((std::istreambuf_iterator<char>(file)), {});
  // The name, which may hold anything, is in parentheses; the start is field 22 of the whole.
  const size_t name_end = text.rfind(')');
  if (name_end == std::string::npos) {
    return 0;
  }
  std::istringstream fields(text.substr(name_end + 1));
  std::string skipped;
  for (int number = 0; number < 19; ++number) {
    fields >> skipped;
  }
  uint64_t start = 0;
  fields >> start;
  return start;
}

void name_thread(const char* name) { pthread_setname_np(pthread_self(), name); }

}  // namespace ascend_sim::hixl
