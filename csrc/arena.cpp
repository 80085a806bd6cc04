// SPDX-License-Identifier: Apache-2.0
#include "arena.h"

#include <iterator>

namespace llmdd {

Arena::Arena(uint64_t total_bytes, unsigned page_shift)
    : page_shift_(page_shift), total_pages_(total_bytes >> page_shift), free_pages_(total_pages_) {
  if (total_pages_ == 0) return;
  spans_.emplace(0, Span{total_pages_, {}});
  free_.emplace(total_pages_, 0);
}

bool Arena::allocate(size_t count, uint64_t nbytes, std::vector<uint64_t>* offsets) {
  const uint64_t page_mask = (uint64_t{1} << page_shift_) - 1;
  const uint64_t pages = (nbytes >> page_shift_) + ((nbytes & page_mask) != 0 ? 1 : 0);
  offsets->clear();
  if (count == 0) return true;
  std::lock_guard<std::mutex> lock(mutex_);
  // Says no early, and bounds the reservation below by what the arena could ever hold.
  if (pages == 0 || pages > free_pages_ || count > free_pages_ / pages) return false;
  bool fits = true;
  try {
    offsets->reserve(count);
    while (fits && offsets->size() < count) {
      uint64_t start = 0;
      fits = allocate_one(pages, &start);
      if (fits) offsets->push_back(start << page_shift_);
    }
  } catch (...) {  // std::bad_alloc from a container
    for (uint64_t offset : *offsets) release_span(spans_.find(offset >> page_shift_));
    offsets->clear();
    throw;
  }
  if (!fits) {
    for (uint64_t offset : *offsets) release_span(spans_.find(offset >> page_shift_));
    offsets->clear();
  }
  return fits;
}

bool Arena::allocate_one(uint64_t pages, uint64_t* start) {
  const auto best = free_.lower_bound({pages, 0});
  if (best == free_.end()) return false;
  const auto [free_pages, free_start] = *best;
  const auto span = spans_.find(free_start);
  if (free_pages == pages) {
    span->second.spare = free_.extract(best);
    *start = free_start;
  } else {
    // Everything that can throw comes before the first change.
    FreeSet spare;
    spare.emplace(pages, 0);
    const uint64_t taken = free_start + free_pages - pages;
    spans_.emplace_hint(std::next(span), taken, Span{pages, spare.extract(spare.begin())});
    auto node = free_.extract(best);
    node.value() = {free_pages - pages, free_start};
    free_.insert(std::move(node));
    span->second.pages = free_pages - pages;
    *start = taken;
  }
  free_pages_ -= pages;
  return true;
}

bool Arena::release(uint64_t offset) noexcept {
  const uint64_t start = offset >> page_shift_;
  if ((start << page_shift_) != offset) return false;
  std::lock_guard<std::mutex> lock(mutex_);
  const auto span = spans_.find(start);
  if (span == spans_.end() || span->second.spare.empty()) return false;
  release_span(span);
  return true;
}

void Arena::release_span(std::map<uint64_t, Span>::iterator span) noexcept {
  FreeSet::node_type node = std::move(span->second.spare);
  free_pages_ += span->second.pages;
  const auto next = std::next(span);
  if (next != spans_.end() && next->second.spare.empty()) {
    free_.erase({next->second.pages, next->first});
    span->second.pages += next->second.pages;
    spans_.erase(next);
  }
  if (span != spans_.begin()) {
    const auto previous = std::prev(span);
    if (previous->second.spare.empty()) {
      free_.erase({previous->second.pages, previous->first});
      previous->second.pages += span->second.pages;
      spans_.erase(span);
      span = previous;
    }
  }
  node.value() = {span->second.pages, span->first};
  free_.insert(std::move(node));
}

ArenaStats Arena::stats() const {
  std::lock_guard<std::mutex> lock(mutex_);
  const uint64_t largest = free_.empty() ? 0 : free_.rbegin()->first;
  uint64_t in_use = spans_.size() - free_.size();
  return {total_pages_ << page_shift_, free_pages_ << page_shift_, largest << page_shift_, in_use};
}

}  // namespace llmdd
