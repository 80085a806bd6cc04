// SPDX-License-Identifier: Apache-2.0
#include "memory.h"

#include <unistd.h>

#include "remote_copy.h"

namespace ascend_sim::hixl {
namespace {

bool is_mapped(uint64_t address) {
  char byte;
  const AscendSimPiece piece{reinterpret_cast<uint64_t>(&byte), address, 1};
  return ascend_sim_remote_copy(getpid(), 0, &piece, 1) == 0;
}

uint32_t refused(uint32_t status, uint64_t address, uint64_t length, const std::string& why) {
  log_error("register_mem: memory of %llu bytes at %#llx %s",
            static_cast<unsigned long long>(length), static_cast<unsigned long long>(address),
            why.c_str());
  return status;
}

}  // namespace

Ranges::Ranges(std::vector<Range> ranges) : ranges_(std::move(ranges)) {
  std::sort(ranges_.begin(), ranges_.end(),
            [](const Range& a, const Range& b) { return a.address < b.address; });
}

const Range* Ranges::holding(uint64_t address, uint64_t length) const {
  auto next =
      std::upper_bound(ranges_.begin(), ranges_.end(), address,
                       [](uint64_t value, const Range& range) { return value < range.address; });
  if (next == ranges_.begin()) {
    return nullptr;
  }
  const Range& found = *std::prev(next);
  return address + length <= found.address + found.length ? &found : nullptr;
}

uint64_t Ranges::alias(uint64_t address, uint64_t length) const {
  const Range* found = holding(address, length);
  return found == nullptr ? 0 : found->alias + (address - found->address);
}

const Range* Ranges::overlap(uint64_t address, uint64_t length) const {
  for (const Range& range : ranges_) {
    if (range.address < address + length && address < range.address + range.length) {
      return &range;
    }
  }
  return nullptr;
}

LocalMemory::LocalMemory(int device) : device_(device), word_(new std::atomic<uint64_t>(kAlive)) {}

std::shared_ptr<const Ranges> LocalMemory::ranges() const {
  const std::lock_guard lock(mutex_);
  return ranges_;
}

void LocalMemory::publish() {
  std::vector<Range> all;
  for (const auto& [handle, range] : by_handle_) {
    all.push_back(range);
  }
  ranges_ = std::make_shared<Ranges>(std::move(all));
}

uint32_t LocalMemory::register_range(uint64_t address, uint64_t length, ::hixl::MemType type,
                                     uint64_t* handle) {
  *handle = 0;
  if (address == 0 || length == 0 || address + length < address) {
    return refused(kParamInvalid, address, length, "is empty, or goes beyond 64 bits");
  }
  const std::lock_guard lock(mutex_);
  const bool is_device = type == ::hixl::MEM_DEVICE;
  for (const auto& [known, range] : by_handle_) {
    if (range.address == address && range.length == length && range.is_device == is_device) {
      *handle = known;
      return kSuccess;
    }
  }
  if (ranges_->overlap(address, length) != nullptr) {
    return refused(kParamInvalid, address, length, "overlaps registered memory");
  }
  if (by_handle_.size() >= limits().ranges) {
    return refused(kFailed, address, length, "would be one range too many");
  }
  uint64_t alias = 0;
  const std::string why = fault(address, length, type, &alias);
  if (!why.empty()) {
    return refused(kFailed, address, length, why);
  }
  *handle = next_handle_++;
  by_handle_[*handle] = Range{address, length, is_device, alias};
  publish();
  return kSuccess;
}

uint32_t LocalMemory::deregister(uint64_t handle, const std::function<bool()>& connected) {
  const std::lock_guard lock(mutex_);
  if (by_handle_.count(handle) == 0) {
    log_error("deregister_mem: unknown handle %llu", static_cast<unsigned long long>(handle));
    return kParamInvalid;
  }
  if (connected()) {
    log_error("deregister_mem: disconnect everything first, peers included");
    return kFailed;
  }
  by_handle_.erase(handle);
  publish();
  return kSuccess;
}

// Why such memory can't be registered, "" if it can.
std::string LocalMemory::fault(uint64_t address, uint64_t length, ::hixl::MemType type,
                               uint64_t* alias) {
  AscendSimMemory place;
  if (ascend_sim_describe(reinterpret_cast<const void*>(address), length, &place) != 0) {
    return "is device address space that is not wholly allocated";
  }
  *alias = place.alias;
  if (type == ::hixl::MEM_HOST) {
    if (place.kind == ASCEND_SIM_DEVICE) {
      return "is device memory, and was said to be host memory";
    }
    return is_mapped(address) && is_mapped(address + length - 1) ? "" : "is not mapped";
  }
  if (place.kind != ASCEND_SIM_DEVICE) {
    return "is host memory, and was said to be device memory";
  }
  if (place.device != device_) {
    return "is on device " + std::to_string(place.device) + ", but the engine is on device " +
           std::to_string(device_);
  }
  if (address % kAlignment != 0 && !warned_) {
    warned_ = true;
    log_warning(
        "register_mem: device memory at %#llx does not start at a multiple of 2 MiB, as HCCS wants "
        "for memory that is not from aclrtMalloc",
        static_cast<unsigned long long>(address));
  }
  return "";
}

}  // namespace ascend_sim::hixl
