// SPDX-License-Identifier: Apache-2.0
#include "host_region.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "os_error.h"

namespace llmdd {
namespace {

// Linux 6.3 and later; older headers lack the names.
constexpr unsigned kMfdNoexecSeal = 0x0008U;

[[noreturn]] void fail(int code, const std::string& doing) {
  throw OsError(code, doing + ": " + std::strerror(code));
}

size_t round_up_to_page(size_t nbytes) {
  const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  if (nbytes > SIZE_MAX - kRegionAlignment - page)
    fail(ENOMEM, "mapping " + std::to_string(nbytes));
  return (nbytes + page - 1) / page * page;
}

// Maps `mapped` bytes (whole pages) of fd from `offset` on, or anonymous memory for fd == -1, on a
// 2 MiB boundary: reserves too much, maps inside, gives back what is left on both sides.
void* map_aligned(int fd, size_t mapped, uint64_t offset) {
  const std::string doing = "mapping " + std::to_string(mapped) + " bytes";
  const size_t reserved = mapped + kRegionAlignment;
  void* span =
      mmap(nullptr, reserved, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (span == MAP_FAILED) fail(errno, doing);
  const uintptr_t first = reinterpret_cast<uintptr_t>(span);
  const uintptr_t start = (first + kRegionAlignment - 1) / kRegionAlignment * kRegionAlignment;
  const int kind = fd >= 0 ? MAP_SHARED : MAP_PRIVATE | MAP_ANONYMOUS;
  void* data = mmap(reinterpret_cast<void*>(start), mapped, PROT_READ | PROT_WRITE,
                    kind | MAP_FIXED, fd, static_cast<off_t>(offset));
  if (data == MAP_FAILED) {
    const int code = errno;
    munmap(span, reserved);
    fail(code, doing);
  }
  if (start != first) munmap(span, start - first);
  const uintptr_t end = start + mapped;
  if (first + reserved != end) munmap(reinterpret_cast<void*>(end), first + reserved - end);
  madvise(data, mapped, MADV_HUGEPAGE);  // a wish: kernels without huge pages refuse it
  return data;
}

int create_memfd() {
  const unsigned flags = MFD_CLOEXEC | MFD_ALLOW_SEALING;
  const int fd = memfd_create("llm_datadist_torch", flags | kMfdNoexecSeal);
  if (fd >= 0 || errno != EINVAL) return fd;
  return memfd_create("llm_datadist_torch", flags);  // before Linux 6.3
}

int open_peer_fd(pid_t pid, int fd) {
  const std::string process = "/proc/" + std::to_string(pid);
  const std::string path = process + "/fd/" + std::to_string(fd);
  const int own = ::open(path.c_str(), O_RDWR | O_CLOEXEC | O_NONBLOCK | O_NOCTTY);
  if (own >= 0) return own;
  int code = errno;
  if (code == ENOENT) {
    const bool alive = access(process.c_str(), F_OK) == 0;
    code = alive ? EBADF : ESRCH;
  }
  fail(code, "opening " + path);
}

// The most that files of many regions grow to. It is address space in the file, not memory.
constexpr uint64_t kSharedFileBytes = uint64_t{1} << 40;
// Larger regions have files of their own as long as there are any descriptors.
constexpr size_t kSmallRegion = size_t{1} << 30;

// Whether so many descriptors are open that regions should not take one each: the kernel gives the
// lowest free number, so that a high one means a full table. Three quarters stay for links.
bool is_running_short(int fd) {
  struct rlimit limit;
  return getrlimit(RLIMIT_NOFILE, &limit) == 0 && static_cast<rlim_t>(fd) >= limit.rlim_cur / 4;
}

std::mutex shared_file_mutex;
std::shared_ptr<RegionFile> shared_file;

// The file of many regions that grows at present, and room in it.
std::shared_ptr<RegionFile> room_in_shared_file(size_t nbytes, uint64_t* offset) {
  std::lock_guard<std::mutex> lock(shared_file_mutex);
  if (shared_file == nullptr || shared_file->is_inherited() ||
      !shared_file->allocate(nbytes, offset)) {
    shared_file = std::make_shared<RegionFile>(0);
    if (!shared_file->allocate(nbytes, offset)) fail(ENOMEM, "room in a file of regions");
  }
  return shared_file;
}

}  // namespace

RegionFile::RegionFile(size_t nbytes) : shared_(nbytes == 0), pid_(getpid()) {
  fd_ = create_memfd();
  if (fd_ < 0) fail(errno, "memfd_create");
  struct stat status;
  const char* failed = nullptr;
  if (nbytes != 0 && ftruncate(fd_, static_cast<off_t>(nbytes)) != 0) failed = "ftruncate";
  if (failed == nullptr && fstat(fd_, &status) != 0) failed = "fstat";
  // So that nobody who opens it can shrink it and turn an access of somebody else's into SIGBUS.
  // Peers map nothing else.
  const int seals = F_SEAL_SHRINK | F_SEAL_SEAL | (shared_ ? 0 : F_SEAL_GROW);
  if (failed == nullptr && fcntl(fd_, F_ADD_SEALS, seals) != 0) failed = "sealing";
  if (failed != nullptr) {
    const int code = errno;
    ::close(fd_);
    fail(code, failed + std::string(" of a memfd"));
  }
  inode_ = status.st_ino;
  device_ = status.st_dev;
}

RegionFile::~RegionFile() { ::close(fd_); }

bool RegionFile::is_inherited() const { return getpid() != pid_; }

bool RegionFile::allocate(size_t nbytes, uint64_t* offset) {
  std::lock_guard<std::mutex> lock(mutex_);
  // Huge pages need the same alignment in the file as in memory.
  const uint64_t start = (end_ + kRegionAlignment - 1) / kRegionAlignment * kRegionAlignment;
  if (nbytes > kSharedFileBytes - std::min(start, kSharedFileBytes)) return false;
  if (ftruncate(fd_, static_cast<off_t>(start + nbytes)) != 0) fail(errno, "growing a memfd");
  end_ = start + nbytes;
  *offset = start;
  return true;
}

void RegionFile::release(uint64_t offset, size_t nbytes) noexcept {
  if (!shared_ || is_inherited()) return;
  fallocate(fd_, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, static_cast<off_t>(offset),
            static_cast<off_t>(nbytes));
}

std::shared_ptr<HostRegion> HostRegion::create(size_t nbytes, bool shareable) {
  if (nbytes == 0) fail(EINVAL, "mapping 0 bytes");
  std::shared_ptr<HostRegion> region(new HostRegion);
  const size_t mapped = round_up_to_page(nbytes);
  if (shareable) {
    region->make_shareable(mapped);
  } else {
    region->reason_ = "asked for private memory";
  }
  region->data_ = map_aligned(region->fd(), mapped, region->offset_);
  region->mapped_ = mapped;
  region->nbytes_ = nbytes;
  return region;
}

void HostRegion::make_shareable(size_t mapped) {
  try {
    try {
      auto own = std::make_shared<RegionFile>(mapped);
      if (mapped > kSmallRegion || !is_running_short(own->fd())) {
        file_ = std::move(own);
        return;
      }
    } catch (const OsError& error) {
      if (error.code() != EMFILE && error.code() != ENFILE) throw;
    }
    file_ = room_in_shared_file(mapped, &offset_);
  } catch (const OsError& error) {
    reason_ = error.what();
  }
}

HostRegion::~HostRegion() {
  if (data_ != nullptr) munmap(data_, mapped_);
  if (file_ != nullptr) file_->release(offset_, mapped_);
}

std::shared_ptr<PeerMapping> PeerMapping::open(pid_t pid, int fd, uint64_t inode, uint64_t device,
                                               size_t nbytes, uint64_t offset) {
  if (pid <= 0) fail(ESRCH, "opening a region of process " + std::to_string(pid));
  if (fd < 0) fail(EBADF, "opening descriptor " + std::to_string(fd) + " of a peer");
  if (nbytes == 0) fail(EINVAL, "mapping 0 bytes");
  std::shared_ptr<PeerMapping> mapping(new PeerMapping);
  const size_t mapped = round_up_to_page(nbytes);
  struct OwnFd {  // the mapping outlives the descriptor, whichever way we leave
    int fd;
    ~OwnFd() { ::close(fd); }
  } own{open_peer_fd(pid, fd)};
  const int seals = fcntl(own.fd, F_GET_SEALS);  // before its size, which it keeps from then on
  struct stat status;
  if (fstat(own.fd, &status) != 0) fail(errno, "fstat of a peer's region");
  const uint64_t size = static_cast<uint64_t>(status.st_size);
  const bool same = S_ISREG(status.st_mode) && status.st_ino == inode && status.st_dev == device &&
                    size >= mapped && offset <= size - mapped && offset % kRegionAlignment == 0;
  if (!same) {
    fail(ESTALE,
         "descriptor " + std::to_string(fd) + " of process " + std::to_string(pid) +
             " is not the region it was announced as (another process may have its id now)");
  }
  if (seals < 0 || (seals & F_SEAL_SHRINK) == 0) {
    fail(EPERM, "descriptor " + std::to_string(fd) + " of process " + std::to_string(pid) +
                    " is not sealed against shrinking, which would end this process with SIGBUS");
  }
  mapping->data_ = map_aligned(own.fd, mapped, offset);
  mapping->mapped_ = mapped;
  mapping->nbytes_ = nbytes;
  return mapping;
}

void PeerMapping::close() noexcept {
  if (data_ != nullptr) munmap(data_, mapped_);
  data_ = nullptr;
}

}  // namespace llmdd
