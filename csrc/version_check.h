// SPDX-License-Identifier: Apache-2.0
// The reader's half of a seqlock: a peer publishes two counters of each cache, and bytes that were
// read between two looks at them are the cache's if the counters still are what they were.
// Torch-free.

#pragma once

#include <cstdint>
#include <optional>

#include "words.h"

namespace llmdd {

struct VersionCheck {
  const uint64_t* counters = nullptr;  // lookup, memory, mapped here; nullptr: nothing is checked
  std::optional<uint64_t> lookup;      // nothing under a lease, which keeps the cache as it is
  uint64_t memory = 0;

  // To be asked before the first byte is read: does the key still lead to this cache?
  bool holds_before() const {
    return counters == nullptr || !lookup || load_word(counters) == *lookup;
  }
  // To be asked after the last byte: was the memory the cache's until now?
  bool holds_after() const { return counters == nullptr || load_word(counters + 1) == memory; }
};

}  // namespace llmdd
