// SPDX-License-Identifier: Apache-2.0
#include "handles.h"

#include <map>
#include <mutex>

namespace sim {
namespace {

std::mutex mutex;

std::map<void*, PhysicalPtr>& handles() {
  static auto& the = *new std::map<void*, PhysicalPtr>;
  return the;
}

}  // namespace

void* add_handle(const PhysicalPtr& physical) {
  std::lock_guard<std::mutex> lock(mutex);
  handles()[physical.get()] = physical;
  return physical.get();
}

PhysicalPtr find_handle(void* handle) {
  std::lock_guard<std::mutex> lock(mutex);
  const auto found = handles().find(handle);
  return found == handles().end() ? nullptr : found->second;
}

bool drop_handle(void* handle) {
  PhysicalPtr dropped;
  std::lock_guard<std::mutex> lock(mutex);
  const auto found = handles().find(handle);
  if (found == handles().end()) return false;
  dropped = std::move(found->second);
  handles().erase(found);
  return true;
}

}  // namespace sim
