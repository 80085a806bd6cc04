// SPDX-License-Identifier: Apache-2.0
#include "transfers.h"

#include <cstring>

namespace ascend_sim::hixl {
namespace {

constexpr std::chrono::milliseconds kPatience(1000);
constexpr uint64_t kSmallestStep = 256 << 10;
constexpr uint64_t kStepsBySize = 32;
constexpr size_t kStepPieces = 256;

bool is_scheduler(const char* name) { return std::strcmp(ascend_sim_scheduler(), name) == 0; }

// Cuts a transfer into steps of limited size; the last is to be done first.
std::vector<std::vector<AscendSimPiece>> steps_of(const std::vector<AscendSimPiece>& pieces) {
  uint64_t total = 0;
  for (const AscendSimPiece& piece : pieces) {
    total += piece.length;
  }
  const uint64_t step_bytes = std::max(kSmallestStep, (total + kStepsBySize - 1) / kStepsBySize);
  std::vector<std::vector<AscendSimPiece>> steps(1);
  uint64_t size = 0;
  for (const AscendSimPiece& piece : pieces) {
    for (uint64_t done = 0; done < piece.length;) {
      if (size == step_bytes || steps.back().size() == kStepPieces) {
        steps.emplace_back();
        size = 0;
      }
      const uint64_t part = std::min(piece.length - done, step_bytes - size);
      steps.back().push_back({piece.local + done, piece.remote + done, part});
      done += part;
      size += part;
    }
  }
  std::reverse(steps.begin(), steps.end());
  return steps;
}

}  // namespace

Transfer::Transfer(std::shared_ptr<Link> link, bool write,
                   const std::vector<AscendSimPiece>& pieces, bool staging, uint64_t user_data)
    : link_(std::move(link)),
      write_(write),
      staging_(staging),
      user_data_(user_data),
      due_(std::chrono::steady_clock::now() + kPatience),
      steps_(steps_of(pieces)) {}

void Transfer::advance() {
  while (waiting() && !hangs_) {
    step(false);
  }
}

void Transfer::advance_at_random() {
  size_t left;
  {
    const std::lock_guard lock(link_->moving());
    left = steps_.size();
  }
  for (uint64_t count = ascend_sim_random() % (left + 1); count > 0; --count) {
    if (waiting() && !hangs_) {
      step(true);
    }
  }
}

bool Transfer::finish(const Deadline& deadline) {
  while (waiting() && !deadline.expired()) {
    if (hangs_) {
      link_->wait_until_closed(deadline);
    }
    if (!hangs_ || link_->closed()) {
      step(false);
    }
  }
  return !waiting();
}

void Transfer::step(bool at_random) {
  const std::lock_guard lock(link_->moving());
  if (!waiting()) {
    return;
  }
  if (link_->closed()) {
    fail();
    return;
  }
  if (at_random) {
    std::swap(steps_[ascend_sim_random() % steps_.size()], steps_.back());
  }
  const Step step = std::move(steps_.back());
  steps_.pop_back();
  if (!move(step)) {
    fail();
  } else if (steps_.empty()) {
    state_ = TransferState::COMPLETED;
  }
}

bool Transfer::move(const Step& step) {
  std::vector<AscendSimPiece> aliased = step;
  for (AscendSimPiece& piece : aliased) {
    const uint64_t alias = link_->local().alias(piece.local, piece.length);
    if (alias == 0 && !staging_) {
      return false;
    }
    // Not registered: host memory, or a wild address. Which of them, moving the bytes will show.
    piece.local = alias == 0 ? piece.local : alias;
  }
  return link_->move(write_, std::move(aliased));
}

void Requests::end() {
  {
    const std::lock_guard lock(mutex_);
    ended_ = true;
  }
  changed_.notify_all();
  if (worker_.joinable()) {
    worker_.join();
  }
}

uint64_t Requests::submit(const std::shared_ptr<Transfer>& transfer) {
  uint64_t number;
  {
    const std::lock_guard lock(mutex_);
    size_t waiting = 0;
    for (const auto& [request, other] : transfers_) {
      waiting += other->waiting() ? 1 : 0;
    }
    if (waiting >= kMaxRequests) {
      return 0;
    }
    number = next_++;
    transfers_[number] = transfer;
  }
  if (is_scheduler("inline")) {
    transfer->advance();
  } else if (is_scheduler("random")) {
    transfer->advance_at_random();
  }
  abandon(transfer);
  return number;
}

void Requests::abandon(const std::shared_ptr<Transfer>& transfer) {
  const std::lock_guard lock(mutex_);
  if (!transfer->waiting() || ended_) {
    return;
  }
  abandoned_.push_back(transfer);
  if (!worker_.joinable()) {
    worker_ = std::thread([this] { work(); });
  }
  changed_.notify_all();
}

std::optional<TransferState> Requests::poll(uint64_t request) {
  std::shared_ptr<Transfer> transfer;
  {
    const std::lock_guard lock(mutex_);
    const auto found = transfers_.find(request);
    if (found != transfers_.end()) {
      transfer = found->second;
    }
  }
  if (transfer == nullptr || transfer->link()->closed()) {
    return std::nullopt;
  }
  if (is_scheduler("random")) {
    transfer->advance_at_random();
  } else if (transfer->polled) {
    transfer->advance();
  }
  transfer->polled = true;
  const TransferState state = transfer->state();
  if (state != TransferState::WAITING) {
    const std::lock_guard lock(mutex_);
    transfers_.erase(request);
  }
  return state;
}

std::vector<TransferReport> Requests::poll_all(uint32_t max_count, bool skip_waiting) {
  std::vector<std::pair<uint64_t, uint64_t>> all;
  {
    const std::lock_guard lock(mutex_);
    for (const auto& [request, transfer] : transfers_) {
      all.emplace_back(request, transfer->user_data());
    }
  }
  std::vector<TransferReport> reports;
  for (const auto& [request, user_data] : all) {
    if (reports.size() == max_count) {
      break;
    }
    const std::optional<TransferState> state = poll(request);
    if (state.has_value() && !(skip_waiting && *state == TransferState::WAITING)) {
      reports.push_back({request, user_data, *state});
    }
  }
  return reports;
}

void Requests::forget(const Link* link) {
  const std::lock_guard lock(mutex_);
  for (auto one = transfers_.begin(); one != transfers_.end();) {
    one = one->second->link().get() == link ? transfers_.erase(one) : std::next(one);
  }
}

void Requests::work() {
  name_thread("hixl");
  std::unique_lock lock(mutex_);
  while (true) {
    changed_.wait(lock, [this] { return ended_ || !abandoned_.empty(); });
    if (ended_) {
      return;
    }
    const std::shared_ptr<Transfer> transfer = abandoned_.front();
    abandoned_.pop_front();
    while (transfer->waiting() && !ended_ && std::chrono::steady_clock::now() < transfer->due()) {
      changed_.wait_for(lock, std::chrono::milliseconds(50));
    }
    if (ended_) {
      return;
    }
    lock.unlock();
    transfer->advance();
    lock.lock();
  }
}

}  // namespace ascend_sim::hixl
