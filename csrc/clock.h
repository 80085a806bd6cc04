// SPDX-License-Identifier: Apache-2.0
// Deadlines are instants of CLOCK_MONOTONIC in nanoseconds; 0 means none. Torch-free.

#pragma once

#include <time.h>

#include <cstdint>

namespace llmdd {

inline int64_t now_ns() {
  timespec now{};
  clock_gettime(CLOCK_MONOTONIC, &now);
  return int64_t{now.tv_sec} * 1'000'000'000 + now.tv_nsec;
}

inline bool deadline_passed(int64_t deadline_ns) {
  return deadline_ns != 0 && now_ns() >= deadline_ns;
}

}  // namespace llmdd
