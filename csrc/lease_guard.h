// SPDX-License-Identifier: Apache-2.0
// Counts the leases on one cache, and checks under each of them that the cache's tensors still are
// where the cache says. Torch-free, Python-free.

#pragma once

#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

namespace llmdd {

// Where a tensor is now.
struct TensorPlace {
  uint64_t address;  // of its first element; 0 where its storage has no memory
  uint64_t end;      // first address behind its last element
};

// The tensors that a guard watches. torch replaces the memory of a storage in place, and the
// storage of a tensor, without telling anybody; so they are looked at again under each lease. A
// list keeps the memory that its tensors have now, not what they had before: that must be seen to
// go.
class TensorList {
 public:
  virtual ~TensorList() = default;
  virtual size_t size() const = 0;
  virtual TensorPlace place(size_t index) const = 0;
};

// Thread safety: every member may be called from any thread.
class LeaseGuard {
 public:
  enum class Outcome {
    kTaken,
    kEnded,     // the cache has ended; those who have a lease may take another one
    kDraining,  // somebody waits for the last lease
    kMoved,
  };
  struct Move {
    size_t index = 0;  // of the tensor
    uint64_t from = 0;
    uint64_t to = 0;
  };

  // Tensor i of the cache is the `nbytes` bytes from addrs[i] on.
  LeaseGuard(std::vector<uint64_t> addrs, uint64_t nbytes);

  // Tensor k of the list must be where tensor k % addrs.size() of the cache is.
  void watch(std::unique_ptr<TensorList> tensors);

  // Takes a lease. `shared`: for somebody who knows of a lease that is held, so that also a cache
  // that has ended is there. On kMoved `move` says what has moved.
  Outcome acquire(bool shared, Move* move);

  // Gives back a lease. Returns whether it was the last one of a cache that has ended.
  bool release() noexcept;

  // Whether a tensor has moved; says which.
  bool moved(Move* move) const;

  // No new leases from now on, other than shared ones. Returns the number of leases.
  size_t end();

  // begin_drain(): no new leases. wait_idle(): waits for the last lease, at most for `wait_ns`;
  // returns how many are left. cancel_drain(): takes begin_drain() back.
  void begin_drain();
  size_t wait_idle(int64_t wait_ns);
  void cancel_drain();

  // Forgets the tensors, so that the guard keeps no memory.
  void forget();

  size_t leases() const;

 private:
  bool moved_locked(Move* move) const;

  const std::vector<uint64_t> addrs_;
  const uint64_t nbytes_;
  mutable std::mutex mutex_;
  std::condition_variable idle_;
  std::unique_ptr<TensorList> tensors_;
  size_t leases_ = 0;
  size_t drains_ = 0;
  bool ended_ = false;
};

}  // namespace llmdd
