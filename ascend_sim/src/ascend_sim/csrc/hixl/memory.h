// SPDX-License-Identifier: Apache-2.0
// Registered memory: what an engine may read and write, and what its peers may.
#pragma once

#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <vector>

#include "../sim_api.h"
#include "common.h"
#include "public.h"

namespace ascend_sim::hixl {

// A registered range, and the address by which its owner's process can be read and written.
struct Range {
  uint64_t address;
  uint64_t length;
  bool is_device;
  uint64_t alias;
};

// Ranges that don't overlap, to look addresses up in. Immutable.
class Ranges {
 public:
  Ranges() = default;
  explicit Ranges(std::vector<Range> ranges);

  // The range that holds all of these bytes, or NULL.
  const Range* holding(uint64_t address, uint64_t length) const;
  // Where these bytes can be read and written, 0 if they aren't registered.
  uint64_t alias(uint64_t address, uint64_t length) const;
  // Some range that has a byte in common with this one, or NULL.
  const Range* overlap(uint64_t address, uint64_t length) const;
  const std::vector<Range>& all() const { return ranges_; }

 private:
  std::vector<Range> ranges_;
};

// What one engine has registered. A peer learns it when it connects, and never again.
class LocalMemory {
 public:
  explicit LocalMemory(int device);
  ~LocalMemory() { end(); }
  // Peers see that the engine has gone.
  void end() { word_->store(kEnded); }

  std::shared_ptr<const Ranges> ranges() const;
  uint32_t register_range(uint64_t address, uint64_t length, ::hixl::MemType type,
                          uint64_t* handle);
  // Refused while the engine is connected with any other.
  uint32_t deregister(uint64_t handle, const std::function<bool()>& connected);
  // Its number in the machine, which is another than this process's where that sees some devices
  // only.
  int device_of_machine() const { return ascend_sim_number_of_device(device_); }
  // Where peers read in this process's memory whether the engine is still there.
  uint64_t word_address() const { return reinterpret_cast<uint64_t>(word_); }

  static constexpr uint64_t kAlive = 1, kEnded = 2;

 private:
  std::string fault(uint64_t address, uint64_t length, ::hixl::MemType type, uint64_t* alias);
  void publish();

  const int device_;
  // Peers read it at any time, also after the engine has gone: it lives as long as the process.
  std::atomic<uint64_t>* const word_;
  mutable std::mutex mutex_;
  std::map<uint64_t, Range> by_handle_;
  std::shared_ptr<const Ranges> ranges_ = std::make_shared<Ranges>();
  uint64_t next_handle_ = 1;
  bool warned_ = false;
};

}  // namespace ascend_sim::hixl
