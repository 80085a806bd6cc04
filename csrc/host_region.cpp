// SPDX-License-Identifier: Apache-2.0
#include "host_region.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

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

// Maps `mapped` bytes (whole pages) of fd, or anonymous memory for fd == -1, on a 2 MiB boundary:
// reserves too much, maps inside, gives back what is left on both sides.
void* map_aligned(int fd, size_t mapped) {
  const std::string doing = "mapping " + std::to_string(mapped) + " bytes";
  const size_t reserved = mapped + kRegionAlignment;
  void* span =
      mmap(nullptr, reserved, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (span == MAP_FAILED) fail(errno, doing);
  const uintptr_t first = reinterpret_cast<uintptr_t>(span);
  const uintptr_t start = (first + kRegionAlignment - 1) / kRegionAlignment * kRegionAlignment;
  const int kind = fd >= 0 ? MAP_SHARED : MAP_PRIVATE | MAP_ANONYMOUS;
  void* data =
      mmap(reinterpret_cast<void*>(start), mapped, PROT_READ | PROT_WRITE, kind | MAP_FIXED, fd, 0);
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

}  // namespace

std::shared_ptr<HostRegion> HostRegion::create(size_t nbytes, bool shareable) {
  if (nbytes == 0) fail(EINVAL, "mapping 0 bytes");
  std::shared_ptr<HostRegion> region(new HostRegion);
  const size_t mapped = round_up_to_page(nbytes);
  if (shareable) {
    region->make_shareable(mapped);
  } else {
    region->reason_ = "asked for private memory";
  }
  region->data_ = map_aligned(region->fd_, mapped);
  region->mapped_ = mapped;
  region->nbytes_ = nbytes;
  return region;
}

void HostRegion::make_shareable(size_t mapped) {
  const int fd = create_memfd();
  if (fd < 0) {
    reason_ = std::string("memfd_create: ") + std::strerror(errno);
    return;
  }
  struct stat status;
  const char* failed = nullptr;
  if (ftruncate(fd, static_cast<off_t>(mapped)) != 0) failed = "ftruncate of a memfd: ";
  if (failed == nullptr && fstat(fd, &status) != 0) failed = "fstat of a memfd: ";
  // So that nobody who opens it can shrink it and turn an access of somebody else's into SIGBUS.
  // Peers map nothing else.
  const int seals = F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL;
  if (failed == nullptr && fcntl(fd, F_ADD_SEALS, seals) != 0) failed = "sealing a memfd: ";
  if (failed != nullptr) {
    reason_ = failed + std::string(std::strerror(errno));
    ::close(fd);
    return;
  }
  fd_ = fd;
  inode_ = status.st_ino;
  device_ = status.st_dev;
}

HostRegion::~HostRegion() {
  if (data_ != nullptr) munmap(data_, mapped_);
  if (fd_ >= 0) ::close(fd_);
}

std::shared_ptr<PeerMapping> PeerMapping::open(pid_t pid, int fd, uint64_t inode, uint64_t device,
                                               size_t nbytes) {
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
  const bool same = S_ISREG(status.st_mode) && status.st_ino == inode && status.st_dev == device &&
                    static_cast<uint64_t>(status.st_size) >= mapped;
  if (!same) {
    fail(ESTALE,
         "descriptor " + std::to_string(fd) + " of process " + std::to_string(pid) +
             " is not the region it was announced as (another process may have its id now)");
  }
  if (seals < 0 || (seals & F_SEAL_SHRINK) == 0) {
    fail(EPERM, "descriptor " + std::to_string(fd) + " of process " + std::to_string(pid) +
                    " is not sealed against shrinking, which would end this process with SIGBUS");
  }
  mapping->data_ = map_aligned(own.fd, mapped);
  mapping->mapped_ = mapped;
  mapping->nbytes_ = nbytes;
  return mapping;
}

void PeerMapping::close() noexcept {
  if (data_ != nullptr) munmap(data_, mapped_);
  data_ = nullptr;
}

}  // namespace llmdd
