// SPDX-License-Identifier: Apache-2.0
#include "lease_guard.h"

#include <chrono>
#include <utility>

namespace llmdd {

LeaseGuard::LeaseGuard(std::vector<uint64_t> addrs, uint64_t nbytes)
    : addrs_(std::move(addrs)), nbytes_(nbytes) {}

void LeaseGuard::watch(std::unique_ptr<TensorList> tensors) {
  std::lock_guard<std::mutex> lock(mutex_);
  tensors_.swap(tensors);
}

LeaseGuard::Outcome LeaseGuard::acquire(bool shared, Move* move) {
  std::lock_guard<std::mutex> lock(mutex_);
  const bool known = shared && leases_ > 0;
  if (ended_ && !known) return Outcome::kEnded;
  if (drains_ > 0 && !known) return Outcome::kDraining;
  if (moved_locked(move)) return Outcome::kMoved;
  ++leases_;
  return Outcome::kTaken;
}

bool LeaseGuard::release() noexcept {
  std::lock_guard<std::mutex> lock(mutex_);
  if (leases_ == 0 || --leases_ > 0) return false;
  idle_.notify_all();
  return ended_;
}

bool LeaseGuard::moved(Move* move) const {
  std::lock_guard<std::mutex> lock(mutex_);
  return moved_locked(move);
}

bool LeaseGuard::moved_locked(Move* move) const {
  if (tensors_ == nullptr || addrs_.empty()) return false;
  const size_t count = tensors_->size();
  for (size_t k = 0; k < count; ++k) {
    const TensorPlace place = tensors_->place(k);
    const size_t index = k % addrs_.size();
    // A tensor that was made smaller may be in the same place.
    if (place.address == addrs_[index] && place.end >= addrs_[index] + nbytes_) continue;
    *move = {index, addrs_[index], place.address};
    return true;
  }
  return false;
}

size_t LeaseGuard::end() {
  std::lock_guard<std::mutex> lock(mutex_);
  ended_ = true;
  return leases_;
}

void LeaseGuard::begin_drain() {
  std::lock_guard<std::mutex> lock(mutex_);
  ++drains_;
}

size_t LeaseGuard::wait_idle(int64_t wait_ns) {
  std::unique_lock<std::mutex> lock(mutex_);
  idle_.wait_for(lock, std::chrono::nanoseconds(wait_ns), [this] { return leases_ == 0; });
  return leases_;
}

void LeaseGuard::cancel_drain() {
  std::lock_guard<std::mutex> lock(mutex_);
  if (drains_ > 0) --drains_;
}

void LeaseGuard::forget() {
  std::unique_ptr<TensorList> dropped;  // tensors may end here, and run code of torch's
  std::lock_guard<std::mutex> lock(mutex_);
  tensors_.swap(dropped);
}

size_t LeaseGuard::leases() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return leases_;
}

}  // namespace llmdd
