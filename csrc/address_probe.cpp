// SPDX-License-Identifier: Apache-2.0
#include "address_probe.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <string>
#include <vector>

#include "os_error.h"

namespace llmdd {
namespace {

struct MappedRange {
  uint64_t start;
  uint64_t end;
  bool readable;
  bool writable;
};

std::string read_maps() {
  const char* path = "/proc/self/maps";
  const int fd = open(path, O_RDONLY | O_CLOEXEC);
  if (fd < 0) throw OsError(errno, std::string("opening ") + path + ": " + std::strerror(errno));
  std::string text;
  size_t used = 0;
  ssize_t got = 0;
  do {
    text.resize(std::max<size_t>(used + 65536, text.size()));
    got = read(fd, &text[used], text.size() - used);
    if (got > 0) used += static_cast<size_t>(got);
  } while (got > 0 || (got < 0 && errno == EINTR));
  const int code = errno;
  close(fd);
  if (got < 0) throw OsError(code, std::string("reading ") + path + ": " + std::strerror(code));
  text.resize(used);
  return text;
}

uint64_t parse_hex(const char** at) {
  uint64_t value = 0;
  for (;; ++*at) {
    const char c = **at;
    if (c >= '0' && c <= '9') {
      value = value * 16 + static_cast<uint64_t>(c - '0');
    } else if (c >= 'a' && c <= 'f') {
      value = value * 16 + static_cast<uint64_t>(c - 'a' + 10);
    } else {
      return value;
    }
  }
}

// Lines are "START-END PERMS ...", in address order. Neighbours with equal permissions become one.
std::vector<MappedRange> mapped_ranges() {
  const std::string text = read_maps();
  std::vector<MappedRange> ranges;
  const char* at = text.c_str();
  while (*at != '\0') {
    const uint64_t start = parse_hex(&at);
    if (*at++ != '-') break;
    const uint64_t end = parse_hex(&at);
    if (at[0] != ' ' || at[1] == '\0' || at[2] == '\0') break;
    const bool readable = at[1] == 'r';
    const bool writable = at[2] == 'w';
    if (!ranges.empty() && ranges.back().end == start && ranges.back().readable == readable &&
        ranges.back().writable == writable) {
      ranges.back().end = end;
    } else {
      ranges.push_back({start, end, readable, writable});
    }
    at = std::strchr(at, '\n');
    if (at == nullptr) break;
    ++at;
  }
  return ranges;
}

const char* fault_of(const std::vector<MappedRange>& ranges, uint64_t start, uint64_t nbytes) {
  if (start == 0) return "address 0";
  if (nbytes > UINT64_MAX - start) return "not mapped";
  const uint64_t end = start + nbytes;
  auto range = std::upper_bound(ranges.begin(), ranges.end(), start,
                                [](uint64_t at, const MappedRange& r) { return at < r.end; });
  for (uint64_t at = start; at < end; at = range->end, ++range) {
    if (range == ranges.end() || range->start > at) return "not mapped";
    if (!range->readable) return "not readable";
    if (!range->writable) return "not writable";
  }
  return nullptr;
}

}  // namespace

ProbeResult probe_extents(const uint64_t* addresses, size_t count, uint64_t nbytes) {
  const std::vector<MappedRange> ranges = mapped_ranges();
  for (size_t i = 0; i < count; ++i) {
    const char* fault = fault_of(ranges, addresses[i], nbytes);
    if (fault != nullptr) return {static_cast<int64_t>(i), fault};
  }
  return {-1, ""};
}

int64_t check_mapped(const uint64_t* addresses, size_t count, uint64_t nbytes) {
  const uint64_t page_mask = static_cast<uint64_t>(sysconf(_SC_PAGESIZE)) - 1;
  for (size_t i = 0; i < count; ++i) {
    const uint64_t start = addresses[i] & ~page_mask;
    if (addresses[i] == 0 || nbytes > UINT64_MAX - addresses[i]) return static_cast<int64_t>(i);
    const uint64_t length = addresses[i] - start + nbytes;
    // For a range without file pages this only walks the mappings, and says ENOMEM at a hole.
    if (msync(reinterpret_cast<void*>(static_cast<uintptr_t>(start)), length, MS_ASYNC) != 0) {
      return static_cast<int64_t>(i);
    }
  }
  return -1;
}

}  // namespace llmdd
