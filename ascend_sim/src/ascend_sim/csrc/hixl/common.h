// SPDX-License-Identifier: Apache-2.0
// What all parts of the simulated transfer engine share.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <stdexcept>
#include <string>

namespace ascend_sim::hixl {

enum : uint32_t {
  kSuccess = 0,
  kParamInvalid = 103900,
  kTimeout = 103901,
  kNotConnected = 103902,
  kAlreadyConnected = 103903,
  kNotifyFailed = 103904,
  kUnsupported = 103905,
  kFailed = 503900,
  kResourceExhausted = 203900,
};

// Limits; tests lower some of them (ascend_sim_hixl_limit).
struct Limits {
  std::atomic<uint64_t> links{512};           // of the HCCL engine
  std::atomic<uint64_t> ranges{4096};         // registered at a time
  std::atomic<uint64_t> heartbeat_ms{10000};  // how often AutoConnect looks for dead links
};
Limits& limits();
constexpr int kMinConnectMs = 200;
constexpr size_t kMaxRequests = 128;  // a stand-in for the streams of a device
constexpr size_t kMaxNotifyCharacters = 1024;
constexpr size_t kMaxUnreadNotifies = 4096;  // of one link
constexpr uint64_t kAlignment = 2 << 20;     // what HCCS wants of memory not from aclrtMalloc

// Messages for people: each thread collects those of its calls, for whoever shows them.
void log_error(const char* format, ...) __attribute__((format(printf, 1, 2)));
void log_warning(const char* format, ...) __attribute__((format(printf, 1, 2)));
std::string take_log();

// One instant until which a whole call may take.
class Deadline {
 public:
  explicit Deadline(int64_t milliseconds)
      : budget_ms_(milliseconds),
        end_(std::chrono::steady_clock::now() + std::chrono::milliseconds(milliseconds)) {}
  static Deadline never() { return Deadline(int64_t{1} << 40); }

  std::chrono::nanoseconds left() const {
    return std::max(std::chrono::nanoseconds(0),
                    std::chrono::nanoseconds(end_ - std::chrono::steady_clock::now()));
  }
  int left_ms() const {  // rounded up, fit for poll()
    return static_cast<int>(std::min<int64_t>((left().count() + 999'999) / 1'000'000, 1 << 30));
  }
  bool expired() const { return left().count() == 0; }
  int64_t budget_ms() const { return budget_ms_; }

 private:
  int64_t budget_ms_;
  std::chrono::steady_clock::time_point end_;
};

struct TimedOut : std::runtime_error {
  using std::runtime_error::runtime_error;
};
struct IoError : std::runtime_error {
  using std::runtime_error::runtime_error;
};
// An argument that is refused with PARAM_INVALID.
struct BadArgument : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// When a process started, in the kernel's ticks, 0 if there is none: process ids are used again.
uint64_t start_time(int pid);

// Sets the name of the calling thread, for debuggers.
void name_thread(const char* name);

}  // namespace ascend_sim::hixl
