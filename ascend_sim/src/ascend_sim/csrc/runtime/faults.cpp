// SPDX-License-Identifier: Apache-2.0
#include "faults.h"

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

#include "../sim_api.h"
#include "acl/acl.h"
#include "errors.h"
#include "faults_api.h"

namespace sim {
namespace {

struct Fault {
  std::string function;
  uint64_t first;  // number of the first call that it hits, 1 is the first of all
  uint64_t last;
  int code;        // 0: none, only the delay
  double seconds;  // 0: no delay
};

struct Faults {
  std::mutex mutex;
  std::vector<Fault> wanted;
  std::map<std::string, uint64_t> counts;
  std::vector<int> away;
  Faults() { add_all(std::getenv("ASCEND_SIM_FAULTS")); }
  void add_all(const char* text);
};

Faults& faults() {
  static Faults& the = *new Faults;
  return the;
}

// "aclrtMalloc@3=207001" fails the third call, "@3-5" the third to the fifth, "@3-" all from the
// third on, without "@" every call; "=0.5s" delays instead; "device=1" takes a device away. Several
// are separated by ";".
void Faults::add_all(const char* text) {
  std::istringstream all(text == nullptr ? "" : text);
  for (std::string one; std::getline(all, one, ';');) {
    const size_t equals = one.rfind('=');
    if (equals == std::string::npos || equals == 0) continue;
    const std::string value = one.substr(equals + 1);
    std::string function = one.substr(0, equals);
    if (function == "device") {
      away.push_back(std::atoi(value.c_str()));
      continue;
    }
    Fault fault{"", 1, UINT64_MAX, 0, 0.0};
    if (const size_t at = function.find('@'); at != std::string::npos) {
      char* end = nullptr;
      fault.first = std::strtoull(function.c_str() + at + 1, &end, 10);
      fault.last = *end != '-'      ? fault.first
                   : end[1] == '\0' ? UINT64_MAX
                                    : std::strtoull(end + 1, nullptr, 10);
      function.resize(at);
    }
    fault.function = function;
    if (!value.empty() && value.back() == 's') {
      fault.seconds = std::strtod(value.c_str(), nullptr);
    } else {
      fault.code = std::atoi(value.c_str());
    }
    wanted.push_back(fault);
  }
}

// Calls that must work for a program to get rid of a device that is gone.
bool works_without_device(const char* function) {
  static const char* const names[] = {
      "aclrtSetDevice",  "aclrtGetDevice",         "aclrtGetDeviceCount",   "aclrtResetDevice",
      "aclrtGetSocName", "aclrtGetCurrentContext", "aclrtDestroyStream",    "aclrtDestroyEvent",
      "aclrtFree",       "aclrtFreeHost",          "aclrtSetCurrentContext"};
  return std::any_of(std::begin(names), std::end(names),
                     [&](const char* name) { return std::strcmp(name, function) == 0; });
}

}  // namespace

bool is_away(int device) {
  Faults& all = faults();
  std::lock_guard<std::mutex> lock(all.mutex);
  return std::find(all.away.begin(), all.away.end(), device) != all.away.end();
}

int enter(const char* function) {
  if (const int code = ascend_sim_fault(function); code != 0) return code;
  const int device = ascend_sim_current_device();
  if (device >= 0 && std::strncmp(function, "aclrt", 5) == 0 && is_away(device) &&
      !works_without_device(function)) {
    return fail(ACL_ERROR_RT_LOST_HEARTBEAT, "device %d was taken away by fault injection", device);
  }
  return 0;
}

}  // namespace sim

int ascend_sim_fault(const char* function) {
  sim::Faults& all = sim::faults();
  double seconds = 0;
  int code = 0;
  {
    std::lock_guard<std::mutex> lock(all.mutex);
    const uint64_t call = ++all.counts[function];
    for (const sim::Fault& fault : all.wanted) {
      if (fault.function != function || call < fault.first || call > fault.last) continue;
      seconds = std::max(seconds, fault.seconds);
      if (fault.code != 0) code = fault.code;
    }
  }
  if (seconds > 0) std::this_thread::sleep_for(std::chrono::duration<double>(seconds));
  if (code != 0) ascend_sim_fail(code, "fault injection failed %s", function);
  return code;
}

void ascend_sim_faults_add(const char* faults) {
  std::lock_guard<std::mutex> lock(sim::faults().mutex);
  sim::faults().add_all(faults);
}

void ascend_sim_faults_reset(void) {
  std::lock_guard<std::mutex> lock(sim::faults().mutex);
  sim::faults().wanted.clear();
  sim::faults().away.clear();
}

size_t ascend_sim_counts(char* out, size_t size) {
  std::lock_guard<std::mutex> lock(sim::faults().mutex);
  std::string text;
  for (const auto& [function, count] : sim::faults().counts)
    text += function + "=" + std::to_string(count) + ";";
  if (size > text.size()) std::memcpy(out, text.c_str(), text.size() + 1);
  return text.size() + 1;
}
