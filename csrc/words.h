// SPDX-License-Identifier: Apache-2.0
// 64-bit counters in memory that other processes read while we write. A reader loads a counter,
// reads data, and loads the counter again: if it has not changed, the data were what they were said
// to be. The fences make that true for data that are read and written by ordinary instructions.

#pragma once

#include <atomic>
#include <cstdint>

namespace llmdd {

// Ordered after the reads before it, and before those after it.
inline uint64_t load_word(const uint64_t* word) {
  std::atomic_thread_fence(std::memory_order_acquire);
  return __atomic_load_n(word, __ATOMIC_ACQUIRE);
}

// Ordered before every write after it: who sees one of those sees the new value, too.
inline uint64_t bump_word(uint64_t* word) {
  const uint64_t value = __atomic_add_fetch(word, 1, __ATOMIC_SEQ_CST);
  std::atomic_thread_fence(std::memory_order_seq_cst);
  return value;
}

}  // namespace llmdd
