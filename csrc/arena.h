// SPDX-License-Identifier: Apache-2.0
// Page-granular best-fit allocator over an address range that somebody else owns: it deals in
// offsets only.

#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <mutex>
#include <set>
#include <utility>
#include <vector>

namespace llmdd {

struct ArenaStats {
  uint64_t total_bytes;
  uint64_t free_bytes;
  uint64_t largest_free_bytes;
  uint64_t spans_in_use;
};

// Hands out spans of whole pages: the smallest free span that suffices, at the lowest address among
// equals, carved from its tail. A returned span merges with its free neighbours at once, so free
// spans are never adjacent and what is free depends on what is in use alone, not on the history.
//
// Thread safety: every member may be called from any thread; release() takes no other lock than the
// arena's own and allocates nothing, so a destructor may call it.
class Arena {
 public:
  // The usable part of total_bytes is its whole pages; page_shift is in [0, 63].
  Arena(uint64_t total_bytes, unsigned page_shift);
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;

  // Byte offsets of `count` spans of at least `nbytes` (> 0) each, in order of allocation. All or
  // nothing: false leaves the arena as it was.
  bool allocate(size_t count, uint64_t nbytes, std::vector<uint64_t>* offsets);

  // Takes back the span that starts at byte `offset`; false if no span in use starts there.
  bool release(uint64_t offset) noexcept;

  ArenaStats stats() const;

 private:
  using FreeSet = std::set<std::pair<uint64_t, uint64_t>>;  // (pages, start)
  struct Span {
    uint64_t pages;
    // A span in use keeps the free-set node that it will need when it is returned; empty while
    // free.
    FreeSet::node_type spare;
  };

  bool allocate_one(uint64_t pages, uint64_t* start);
  void release_span(std::map<uint64_t, Span>::iterator span) noexcept;

  const unsigned page_shift_;
  const uint64_t total_pages_;
  mutable std::mutex mutex_;
  std::map<uint64_t, Span> spans_;  // by start; together they cover every page
  FreeSet free_;
  uint64_t free_pages_ = 0;
};

}  // namespace llmdd
