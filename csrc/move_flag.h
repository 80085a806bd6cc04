// SPDX-License-Identifier: Apache-2.0
// How a storage that lets go of a cache's memory tells peers, who read a counter and ask nobody.
// Torch-free, Python-free.

#pragma once

#include <unistd.h>

#include <cstdint>
#include <memory>
#include <mutex>
#include <utility>

#include "words.h"

namespace llmdd {

// The counter of one cache, while peers may know the cache.
//
// Thread safety: every member may be called from any thread.
class MoveFlag {
 public:
  // `word` must stay mapped until disarm() has returned.
  void arm(uint64_t* word) {
    std::lock_guard<std::mutex> lock(mutex_);
    word_ = word;
    pid_ = getpid();
  }

  void disarm() {
    std::lock_guard<std::mutex> lock(mutex_);
    word_ = nullptr;
  }

  // Memory of the cache is no longer that of its tensor. What a forked child lets go of is not its
  // parent's, whose counter it shares.
  void raise() noexcept {
    std::lock_guard<std::mutex> lock(mutex_);
    if (word_ != nullptr && getpid() == pid_) bump_word(word_);
  }

 private:
  std::mutex mutex_;
  uint64_t* word_ = nullptr;
  pid_t pid_ = 0;
};

// What a storage holds on to: its memory, and whom to tell when it lets go of that.
class WatchedMemory {
 public:
  WatchedMemory(std::shared_ptr<void> memory, std::shared_ptr<MoveFlag> flag)
      : memory_(std::move(memory)), flag_(std::move(flag)) {}
  WatchedMemory(const WatchedMemory&) = delete;
  WatchedMemory& operator=(const WatchedMemory&) = delete;
  // First the counter: afterwards the memory may be anybody's.
  ~WatchedMemory() {
    if (flag_ != nullptr) flag_->raise();
  }

 private:
  const std::shared_ptr<void> memory_;
  const std::shared_ptr<MoveFlag> flag_;
};

}  // namespace llmdd
