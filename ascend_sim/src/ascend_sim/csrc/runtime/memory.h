// SPDX-License-Identifier: Apache-2.0
// The memory of the simulated devices. Device addresses are a range that the host may not touch;
// every one of them has an alias, at a fixed distance, that the simulator itself reads and writes.
// The bytes are in a memfd per device, so that other processes can map them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

namespace sim {

constexpr size_t kPage = 4096;
constexpr size_t kHugePage = size_t{2} << 20;

inline uintptr_t to_int(const void* address) { return reinterpret_cast<uintptr_t>(address); }
inline void* to_pointer(uintptr_t address) { return reinterpret_cast<void*>(address); }
inline size_t round_up(size_t n, size_t unit) { return (n + unit - 1) / unit * unit; }

// Physical memory of a device; gives it back when the last owner goes.
class Physical {
 public:
  Physical(int device, int fd, size_t offset, size_t size, bool is_ours)
      : device(device), fd(fd), offset(offset), size(size), home(device), is_ours_(is_ours) {}
  ~Physical();
  Physical(const Physical&) = delete;
  Physical& operator=(const Physical&) = delete;

  const int device;
  const int fd;
  const size_t offset;
  const size_t size;
  int home;  // the device that it is in; imported memory has the importer's as `device`
  bool is_apart = false;     // mapped piece by piece (expandable segments), not by aclrtMalloc
  bool is_fresh = true;      // nothing was written to it yet, not even poison
  bool is_exported = false;  // other processes may have it mapped

  bool is_imported() const { return !is_ours_; }

 private:
  const bool is_ours_;  // else it was imported: only the descriptor is closed
};
using PhysicalPtr = std::shared_ptr<Physical>;

// Takes memory of a device. Returns null if it has not that much left.
PhysicalPtr take_physical(int device, size_t nbytes);
size_t used_bytes(int device);

struct Range {
  uintptr_t start;
  size_t size;
  int device;  // -1 for host memory
  PhysicalPtr physical;
  size_t offset;  // in the physical memory
};

// Device addresses. Sizes are exact: a byte behind one of them is out of range.
uintptr_t reserve_addresses(size_t nbytes, size_t alignment);  // 0 if there are none left
bool release_addresses(uintptr_t start);                       // with everything mapped in it
bool map_physical(uintptr_t start, size_t nbytes, const PhysicalPtr& physical, size_t offset);
bool unmap_physical(uintptr_t start);
bool is_device_address(uintptr_t address);
bool find_range(uintptr_t address, Range* out);  // the mapped range that holds a device address

// Pinned host memory.
void* allocate_pinned(size_t nbytes);
bool free_pinned(void* address);
bool register_pinned(uintptr_t start, size_t nbytes);
bool unregister_pinned(uintptr_t start);
bool find_pinned(uintptr_t address, Range* out);

// Overwrites memory with the poison byte.
void poison(void* alias, size_t nbytes);

}  // namespace sim
