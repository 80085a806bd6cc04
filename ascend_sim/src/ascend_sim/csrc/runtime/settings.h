// SPDX-License-Identifier: Apache-2.0
// What the simulator was asked for, by environment variables, which child processes inherit.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace sim {

enum class Scheduler { kLazy, kRandom, kInline };

struct Settings {
  int devices;          // how many devices this process sees
  size_t memory;        // ASCEND_SIM_MEMORY: bytes of each device
  Scheduler scheduler;  // ASCEND_SIM_SCHEDULER
  uint64_t seed;        // ASCEND_SIM_SEED
  std::string soc;      // ASCEND_SIM_SOC
  int poison;  // ASCEND_SIM_POISON: the byte that fresh and freed memory is filled with, -1 for
               // none
  std::vector<int> numbers;  // of the devices that this process sees, in the machine
};

const Settings& settings();

// The next number of the seeded generator.
uint64_t random_number();

}  // namespace sim
