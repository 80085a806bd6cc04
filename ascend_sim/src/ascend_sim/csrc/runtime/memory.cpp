// SPDX-License-Identifier: Apache-2.0
#include "memory.h"

#include <fcntl.h>
#include <linux/falloc.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <deque>
#include <map>
#include <mutex>
#include <vector>

#include "../sim_api.h"
#include "settings.h"

namespace sim {
namespace {

// Not more, because ThreadSanitizer leaves little to choose from.
constexpr size_t kAddressSpace = size_t{512} << 30;
// Freed ranges keep readable poison under them, 2 MiB per kernel mapping, of which there are 65530:
// the oldest give way.
constexpr size_t kMaxPoisonedPieces = 8192;
// Likewise of memory that was imported and is closed again, apart from those: importing the same
// allocation over and over must not look like a leak of mappings.
constexpr size_t kMaxPoisonedImports = 64;

struct Device {
  int fd = -1;
  size_t end = 0;  // addresses in the file are never used twice: holes cost nothing
  size_t used = 0;
};

// Ranges of aliases with poison under them, the oldest first.
struct Poisoned {
  const size_t max_pieces;
  std::deque<Range> ranges;
  size_t pieces = 0;

  static size_t pieces_of(const Range& range) {
    return round_up(range.size, kHugePage) / kHugePage;
  }
  void add(const Range& range);
  void forget(uintptr_t start, size_t nbytes);
};

struct Memory {
  std::mutex mutex;
  std::vector<Device> devices = std::vector<Device>(settings().devices);
  uintptr_t base = 0;   // of the device addresses
  uintptr_t alias = 0;  // of their aliases
  uintptr_t next = 0;
  std::map<uintptr_t, size_t> reserved;
  std::map<uintptr_t, Range> mapped;
  std::map<uintptr_t, Range> pinned;
  std::map<uintptr_t, size_t> pinned_by_us;  // start -> bytes of the mapping
  int poison_fd = -1;
  Poisoned poisoned{kMaxPoisonedPieces};
  Poisoned poisoned_imports{kMaxPoisonedImports};

  void make_address_space();
  void bury(const Range& range);
  void unmap(std::map<uintptr_t, Range>::iterator at, std::vector<PhysicalPtr>* dropped);
  uintptr_t alias_of(uintptr_t address) const { return address - base + alias; }
};

Memory& memory() {
  static Memory& the = *new Memory;
  return the;
}

uintptr_t map_nothing(size_t nbytes) {
  void* start =
      mmap(nullptr, nbytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  return start == MAP_FAILED ? 0 : to_int(start);
}

void Memory::make_address_space() {
  if (base != 0) return;
  const uintptr_t start = map_nothing(kAddressSpace + kHugePage);
  const uintptr_t shadow = map_nothing(kAddressSpace + kHugePage);
  if (start == 0 || shadow == 0) return;
  madvise(to_pointer(start), kAddressSpace + kHugePage, MADV_DONTDUMP);
  alias = round_up(shadow, kHugePage);
  base = next = round_up(start, kHugePage);
}

void Poisoned::add(const Range& range) {
  ranges.push_back(range);
  pieces += pieces_of(range);
  while (pieces > max_pieces && ranges.size() > 1) {
    const Range& oldest = ranges.front();
    mmap(to_pointer(oldest.start), oldest.size, PROT_NONE,
         MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | MAP_NORESERVE, -1, 0);
    pieces -= pieces_of(oldest);
    ranges.pop_front();
  }
}

// Something else is mapped there now.
void Poisoned::forget(uintptr_t start, size_t nbytes) {
  const auto overlaps = [&](const Range& old) {
    const bool overlaps = old.start < start + nbytes && start < old.start + old.size;
    if (overlaps) pieces -= pieces_of(old);
    return overlaps;
  };
  ranges.erase(std::remove_if(ranges.begin(), ranges.end(), overlaps), ranges.end());
}

// Lets whoever still has a pointer to freed memory read poison instead of crashing, and write to
// nobody's memory.
void Memory::bury(const Range& range) {
  const uintptr_t start = alias_of(range.start);
  const size_t whole = round_up(range.size, kPage);
  const int byte = settings().poison;
  if (poison_fd < 0) {
    poison_fd = memfd_create("ascend_sim_poison", MFD_CLOEXEC);
    const std::vector<char> content(kHugePage, static_cast<char>(byte < 0 ? 0 : byte));
    if (poison_fd < 0 ||
        write(poison_fd, content.data(), kHugePage) != static_cast<ssize_t>(kHugePage))
      return;
  }
  for (size_t at = 0; at < whole; at += kHugePage) {
    mmap(to_pointer(start + at), std::min(kHugePage, whole - at), PROT_READ | PROT_WRITE,
         MAP_PRIVATE | MAP_FIXED | MAP_NORESERVE, poison_fd, 0);
  }
  auto& kept = range.physical->is_imported() ? poisoned_imports : poisoned;
  kept.add({start, whole, -1, nullptr, 0});
}

// The last owner of physical memory takes the lock, so it goes only after the lock was given back:
// into `dropped`.
void Memory::unmap(std::map<uintptr_t, Range>::iterator at, std::vector<PhysicalPtr>* dropped) {
  bury(at->second);
  dropped->push_back(at->second.physical);
  mapped.erase(at);
}

bool find(const std::map<uintptr_t, Range>& ranges, uintptr_t address, Range* out) {
  auto at = ranges.upper_bound(address);
  if (at == ranges.begin()) return false;
  --at;
  if (address - at->second.start >= at->second.size) return false;
  *out = at->second;
  return true;
}

}  // namespace

void poison(void* alias, size_t nbytes) {
  if (settings().poison >= 0) std::memset(alias, settings().poison, nbytes);
}

Physical::~Physical() {
  if (!is_ours_) {
    close(fd);
    return;
  }
  Memory& all = memory();
  const size_t whole = round_up(size, kPage);
  if (is_exported) {
    // Another process may still map it: what it finds there is poison, and what it writes harms
    // nobody.
    void* view =
        mmap(nullptr, whole, PROT_READ | PROT_WRITE, MAP_SHARED, fd, static_cast<off_t>(offset));
    if (view != MAP_FAILED) {
      poison(view, whole);
      munmap(view, whole);
    }
  } else {
    fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, static_cast<off_t>(offset),
              static_cast<off_t>(whole));
  }
  std::lock_guard<std::mutex> lock(all.mutex);
  all.devices[device].used -= whole;
}

PhysicalPtr take_physical(int device, size_t nbytes) {
  Memory& all = memory();
  const size_t whole = round_up(nbytes, kPage);
  std::lock_guard<std::mutex> lock(all.mutex);
  Device& from = all.devices[device];
  if (whole < nbytes || whole > settings().memory - from.used) return nullptr;
  if (from.fd < 0) from.fd = memfd_create("ascend_sim_device", MFD_CLOEXEC);
  const size_t offset = round_up(from.end, kHugePage);
  if (from.fd < 0 || ftruncate(from.fd, static_cast<off_t>(offset + whole)) != 0) return nullptr;
  from.end = offset + whole;
  from.used += whole;
  return std::make_shared<Physical>(device, from.fd, offset, nbytes, true);
}

size_t used_bytes(int device) {
  std::lock_guard<std::mutex> lock(memory().mutex);
  return memory().devices[device].used;
}

uintptr_t reserve_addresses(size_t nbytes, size_t alignment) {
  Memory& all = memory();
  std::lock_guard<std::mutex> lock(all.mutex);
  all.make_address_space();
  // A gap behind every range: running over its end must not hit the next one.
  const size_t whole = round_up(nbytes, kHugePage) + kHugePage;
  if (all.base == 0 || nbytes > kAddressSpace) return 0;
  const size_t unit = std::max(alignment, kHugePage);
  uintptr_t start = round_up(all.next, unit);
  if (start + whole > all.base + kAddressSpace) {
    // Addresses are used again only when all were used once: the first gap that is large enough.
    start = round_up(all.base, unit);
    for (const auto& [taken, size] : all.reserved) {
      if (start + whole <= taken) break;
      start = round_up(taken + round_up(size, kHugePage) + kHugePage, unit);
    }
    if (start + whole > all.base + kAddressSpace) return 0;
  }
  all.next = start + whole;
  all.reserved[start] = nbytes;
  return start;
}

bool release_addresses(uintptr_t start) {
  Memory& all = memory();
  std::vector<PhysicalPtr> dropped;
  std::lock_guard<std::mutex> lock(all.mutex);
  const auto at = all.reserved.find(start);
  if (at == all.reserved.end()) return false;
  const uintptr_t end = start + at->second;
  for (auto range = all.mapped.lower_bound(start);
       range != all.mapped.end() && range->first < end;) {
    all.unmap(range++, &dropped);
  }
  all.reserved.erase(at);
  return true;
}

bool map_physical(uintptr_t start, size_t nbytes, const PhysicalPtr& physical, size_t offset) {
  Memory& all = memory();
  const size_t whole = round_up(nbytes, kPage);
  std::lock_guard<std::mutex> lock(all.mutex);
  auto held = all.reserved.upper_bound(start);
  if (held == all.reserved.begin()) return false;
  --held;
  if (start - held->first + nbytes > held->second || nbytes == 0) return false;
  const auto next = all.mapped.lower_bound(start);
  if (next != all.mapped.end() && next->first < start + nbytes) return false;
  if (Range before; find(all.mapped, start, &before)) return false;
  void* alias = to_pointer(all.alias_of(start));
  void* made = mmap(alias, whole, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, physical->fd,
                    static_cast<off_t>(physical->offset + offset));
  if (made == MAP_FAILED) return false;
  for (Poisoned* kept : {&all.poisoned, &all.poisoned_imports}) kept->forget(to_int(alias), whole);
  if (physical->is_fresh) poison(alias, whole);
  if (nbytes >= physical->size) physical->is_fresh = false;
  all.mapped[start] = {start, nbytes, physical->device, physical, offset};
  return true;
}

bool unmap_physical(uintptr_t start) {
  Memory& all = memory();
  std::vector<PhysicalPtr> dropped;
  std::lock_guard<std::mutex> lock(all.mutex);
  const auto at = all.mapped.find(start);
  if (at == all.mapped.end()) return false;
  all.unmap(at, &dropped);
  return true;
}

bool is_device_address(uintptr_t address) {
  const Memory& all = memory();
  return all.base != 0 && address >= all.base && address - all.base < kAddressSpace;
}

bool find_range(uintptr_t address, Range* out) {
  std::lock_guard<std::mutex> lock(memory().mutex);
  return find(memory().mapped, address, out);
}

void* allocate_pinned(size_t nbytes) {
  Memory& all = memory();
  const size_t whole = round_up(nbytes, kPage);
  void* start = mmap(nullptr, whole, PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (start == MAP_FAILED) return nullptr;
  poison(start, whole);
  std::lock_guard<std::mutex> lock(all.mutex);
  all.pinned[to_int(start)] = {to_int(start), nbytes, -1, nullptr, 0};
  all.pinned_by_us[to_int(start)] = whole;
  return start;
}

bool free_pinned(void* address) {
  Memory& all = memory();
  std::lock_guard<std::mutex> lock(all.mutex);
  const auto at = all.pinned_by_us.find(to_int(address));
  if (at == all.pinned_by_us.end()) return false;
  const size_t whole = at->second;
  all.pinned_by_us.erase(at);
  all.pinned.erase(to_int(address));
  // Host addresses are the kernel's to give out again, so these aren't kept: who touches freed host
  // memory crashes, as anywhere. Tasks look first whether it is still there.
  munmap(address, whole);
  return true;
}

bool register_pinned(uintptr_t start, size_t nbytes) {
  std::lock_guard<std::mutex> lock(memory().mutex);
  Range found;
  if (nbytes == 0 || find(memory().pinned, start, &found)) return false;
  memory().pinned[start] = {start, nbytes, -1, nullptr, 0};
  return true;
}

bool unregister_pinned(uintptr_t start) {
  std::lock_guard<std::mutex> lock(memory().mutex);
  return memory().pinned_by_us.count(start) == 0 && memory().pinned.erase(start) == 1;
}

bool find_pinned(uintptr_t address, Range* out) {
  std::lock_guard<std::mutex> lock(memory().mutex);
  return find(memory().pinned, address, out);
}

}  // namespace sim

void* ascend_sim_alias(const void* address, size_t nbytes) {
  const uintptr_t start = sim::to_int(address);
  if (!sim::is_device_address(start)) return const_cast<void*>(address);
  sim::Memory& all = sim::memory();
  std::lock_guard<std::mutex> lock(all.mutex);
  // Expandable segments are many ranges side by side; a copy may run over several.
  uintptr_t at = start;
  const uintptr_t end = start + std::max<size_t>(nbytes, 1);
  while (at < end) {
    sim::Range range;
    if (!sim::find(all.mapped, at, &range)) return nullptr;
    at = range.start + range.size;
  }
  return sim::to_pointer(all.alias_of(start));
}

int ascend_sim_device_of(const void* address) {
  sim::Range range;
  const uintptr_t start = sim::to_int(address);
  return sim::is_device_address(start) && sim::find_range(start, &range) ? range.device : -1;
}

int ascend_sim_describe(const void* address, size_t nbytes, AscendSimMemory* out) {
  const uintptr_t start = sim::to_int(address);
  const void* alias = ascend_sim_alias(address, nbytes);
  if (alias == nullptr) return -1;
  sim::Range range{0, 0, -1, nullptr, 0};
  out->kind = ASCEND_SIM_HOST;
  if (sim::is_device_address(start)) {
    if (!sim::find_range(start, &range)) return -1;
    out->kind = ASCEND_SIM_DEVICE;
  } else if (sim::find_pinned(start, &range)) {
    out->kind = ASCEND_SIM_PINNED;
  }
  out->device = range.device;
  out->alias = sim::to_int(alias);
  out->allocation = range.start;
  out->allocation_size = range.size;
  return 0;
}
