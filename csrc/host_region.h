// SPDX-License-Identifier: Apache-2.0
// Host memory that other processes of this machine can map, and the mapping of such memory of a
// peer.

#pragma once

#include <sys/types.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>

namespace llmdd {

// Mappings start on this boundary: transports want it (HCCS), and huge pages need it.
constexpr size_t kRegionAlignment = size_t{2} << 20;

// A memfd that holds one region, or, where descriptors are running short, many.
//
// Thread safety: allocate() and release() may be called from any thread.
class RegionFile {
 public:
  // Throws OsError. `nbytes`: the size for good of a file for one region; 0 for one that grows.
  explicit RegionFile(size_t nbytes);
  ~RegionFile();
  RegionFile(const RegionFile&) = delete;
  RegionFile& operator=(const RegionFile&) = delete;

  // Room for a region in a file that grows, at an offset that no region had before: a peer that
  // still writes to a freed region must not hit another one. False where the file has no more.
  bool allocate(size_t nbytes, uint64_t* offset);
  // Gives memory back to the kernel. Nothing happens in a forked child: the memory is its parent's.
  void release(uint64_t offset, size_t nbytes) noexcept;

  bool is_shared() const { return shared_; }
  bool is_inherited() const;  // by a forked child
  int fd() const { return fd_; }
  uint64_t inode() const { return inode_; }
  uint64_t device() const { return device_; }

 private:
  const bool shared_;
  const pid_t pid_;
  int fd_ = -1;
  uint64_t inode_ = 0;
  uint64_t device_ = 0;
  std::mutex mutex_;
  uint64_t end_ = 0;
};

// One span of zeroed memory, freed with its last reference. Shareable means that it lies in a memfd
// that can't shrink: a peer opens it through /proc/PID/fd/FD. After fork() parent and child share
// the pages of a shareable region: what one writes, the other sees.
//
// A region has a file of its own while descriptors are plentiful; else it lies in a file with
// others, so that any number of regions takes one descriptor. When such a region is freed, forked
// children and whoever else maps it read zeros.
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
  int fd() const { return file_ == nullptr ? -1 : file_->fd(); }  // -1: not shareable
  uint64_t inode() const { return file_ == nullptr ? 0 : file_->inode(); }
  uint64_t device() const { return file_ == nullptr ? 0 : file_->device(); }
  uint64_t offset() const { return offset_; }  // in the file
  const std::string& reason() const { return reason_; }

 private:
  HostRegion() = default;
  void make_shareable(size_t mapped);  // finds a file, or sets reason_

  void* data_ = nullptr;
  size_t nbytes_ = 0;
  size_t mapped_ = 0;
  std::shared_ptr<RegionFile> file_;
  uint64_t offset_ = 0;
  std::string reason_;
};

// A peer's shareable region, mapped here for reading and writing.
//
// Thread safety: close() must not run while another thread copies from or to the mapping.
class PeerMapping {
 public:
  // Throws OsError: ESRCH (no such process), EBADF (it has no such descriptor), ESTALE (the
  // descriptor is not the file described by inode and device, with nbytes from offset on), or
  // whatever the kernel says.
  static std::shared_ptr<PeerMapping> open(pid_t pid, int fd, uint64_t inode, uint64_t device,
                                           size_t nbytes, uint64_t offset);
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
