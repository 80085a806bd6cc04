// SPDX-License-Identifier: Apache-2.0
// Host memory that other processes of this machine can map, and the mapping of such memory of a
// peer.

#pragma once

#include <sys/types.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

namespace llmdd {

// Mappings start on this boundary: transports want it (HCCS), and huge pages need it.
constexpr size_t kRegionAlignment = size_t{2} << 20;

// One span of zeroed memory, freed with its last reference. Shareable means backed by a memfd whose
// size is sealed: a peer opens it through /proc/PID/fd/FD. After fork() parent and child share the
// pages of a shareable region: what one writes, the other sees.
//
// Thread safety: immutable after creation.
class HostRegion {
 public:
  // Throws OsError where the kernel has no room (ENOMEM). A kernel that refuses memfd gives private
  // memory; reason() then says why.
  static std::shared_ptr<HostRegion> create(size_t nbytes, bool shareable);
  ~HostRegion();
  HostRegion(const HostRegion&) = delete;
  HostRegion& operator=(const HostRegion&) = delete;

  void* data() const { return data_; }
  // As asked for; the mapping ends at the next system page.
  size_t nbytes() const { return nbytes_; }
  int fd() const { return fd_; }  // -1: not shareable
  uint64_t inode() const { return inode_; }
  uint64_t device() const { return device_; }
  const std::string& reason() const { return reason_; }

 private:
  HostRegion() = default;
  void make_shareable(size_t mapped);  // opens fd_, or sets reason_

  void* data_ = nullptr;
  size_t nbytes_ = 0;
  size_t mapped_ = 0;
  int fd_ = -1;
  uint64_t inode_ = 0;
  uint64_t device_ = 0;
  std::string reason_;
};

// A peer's shareable region, mapped here for reading and writing.
//
// Thread safety: close() must not run while another thread copies from or to the mapping.
class PeerMapping {
 public:
  // Throws OsError: ESRCH (no such process), EBADF (it has no such descriptor), ESTALE (the
  // descriptor is not the region described by inode, device and nbytes), or whatever the kernel
  // says.
  static std::shared_ptr<PeerMapping> open(pid_t pid, int fd, uint64_t inode, uint64_t device,
                                           size_t nbytes);
  ~PeerMapping() { close(); }
  PeerMapping(const PeerMapping&) = delete;
  PeerMapping& operator=(const PeerMapping&) = delete;

  void* data() const { return data_; }  // nullptr once closed
  size_t nbytes() const { return nbytes_; }
  void close() noexcept;  // idempotent

 private:
  PeerMapping() = default;

  void* data_ = nullptr;
  size_t nbytes_ = 0;
  size_t mapped_ = 0;
};

}  // namespace llmdd
