// SPDX-License-Identifier: Apache-2.0
#include "settings.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <utility>

#include "../sim_api.h"

namespace sim {
namespace {

uint64_t number_from(const char* name, uint64_t otherwise) {
  const char* text = std::getenv(name);
  return text != nullptr && *text != '\0' ? std::strtoull(text, nullptr, 0) : otherwise;
}

std::string text_from(const char* name, const char* otherwise) {
  const char* text = std::getenv(name);
  return text != nullptr && *text != '\0' ? text : otherwise;
}

Scheduler scheduler_from(const std::string& name) {
  if (name == "random") return Scheduler::kRandom;
  return name == "inline" ? Scheduler::kInline : Scheduler::kLazy;
}

// The devices of the machine that this process sees, in its order: ASCEND_RT_VISIBLE_DEVICES, up to
// the first number that isn't one, or all of ASCEND_SIM_DEVICES.
std::vector<int> visible_devices() {
  const int count = static_cast<int>(number_from("ASCEND_SIM_DEVICES", 2));
  const std::string listed = text_from("ASCEND_RT_VISIBLE_DEVICES", "");
  std::vector<int> numbers;
  if (listed.empty()) {
    numbers.resize(count);
    std::iota(numbers.begin(), numbers.end(), 0);
    return numbers;
  }
  for (const char* at = listed.c_str();; ++at) {
    char* end = nullptr;
    const long number = std::strtol(at, &end, 10);
    const bool is_new = std::find(numbers.begin(), numbers.end(), number) == numbers.end();
    if (end == at || number < 0 || number >= count || !is_new) return numbers;
    numbers.push_back(static_cast<int>(number));
    at = end;
    if (*at != ',') return numbers;
  }
}

Settings read() {
  const char* poison = std::getenv("ASCEND_SIM_POISON");
  const bool none = poison != nullptr && std::strcmp(poison, "none") == 0;
  std::vector<int> numbers = visible_devices();
  return {static_cast<int>(numbers.size()),
          number_from("ASCEND_SIM_MEMORY", uint64_t{2} << 30),
          scheduler_from(text_from("ASCEND_SIM_SCHEDULER", "lazy")),
          number_from("ASCEND_SIM_SEED", 0),
          text_from("ASCEND_SIM_SOC", "Ascend910B1"),
          none ? -1 : static_cast<int>(number_from("ASCEND_SIM_POISON", 0xA5) & 0xFF),
          std::move(numbers)};
}

}  // namespace

const Settings& settings() {
  static const Settings& the = *new Settings(read());
  return the;
}

uint64_t random_number() {
  static std::atomic<uint64_t> state{settings().seed};
  // splitmix64: any seed is a good one.
  uint64_t z = state.fetch_add(0x9E3779B97F4A7C15ULL) + 0x9E3779B97F4A7C15ULL;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ULL;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBULL;
  return z ^ (z >> 31);
}

}  // namespace sim

int ascend_sim_number_of_device(int device) {
  const std::vector<int>& numbers = sim::settings().numbers;
  return device >= 0 && device < static_cast<int>(numbers.size()) ? numbers[device] : device;
}

const char* ascend_sim_scheduler(void) {
  switch (sim::settings().scheduler) {
    case sim::Scheduler::kRandom:
      return "random";
    case sim::Scheduler::kInline:
      return "inline";
    default:
      return "lazy";
  }
}

uint64_t ascend_sim_random(void) { return sim::random_number(); }
