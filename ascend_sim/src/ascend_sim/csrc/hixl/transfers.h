// SPDX-License-Identifier: Apache-2.0
// Transfers: their pieces, and when they move.
//
// An asynchronous transfer moves its bytes when the runtime's scheduler says so, never in step with
// streams: who uses memory again before a transfer is complete sees wrong data. `inline` moves all
// at once; `lazy` as late as possible, when the state is asked for a second time; `random` some
// when submitted and some whenever the state is asked for, in any order. What nobody asks for moves
// too, a second after it was submitted: there is no way to cancel.
#pragma once

#include <condition_variable>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <thread>
#include <vector>

#include "links.h"

namespace ascend_sim::hixl {

using TransferState = ::hixl::TransferStatus;

// The bytes of one call, and how far they are.
class Transfer {
 public:
  // `staging`: what is not registered here is taken for host memory.
  Transfer(std::shared_ptr<Link> link, bool write, const std::vector<AscendSimPiece>& pieces,
           bool staging, uint64_t user_data);

  const std::shared_ptr<Link>& link() const { return link_; }
  uint64_t user_data() const { return user_data_; }
  TransferState state() const { return state_; }
  bool waiting() const { return state_ == TransferState::WAITING; }
  std::chrono::steady_clock::time_point due() const { return due_; }
  // It never comes to an end by itself.
  void hang() { hangs_ = true; }
  // It has failed; what has been moved stays.
  void fail() { state_ = TransferState::FAILED; }
  // Moves all that is left, unless it hangs.
  void advance();
  // Moves any number of steps, in any order.
  void advance_at_random();
  // Moves what is left, until the deadline; false if it passed.
  bool finish(const Deadline& deadline);

  bool polled = false;

 private:
  using Step = std::vector<AscendSimPiece>;

  void step(bool at_random);
  bool move(const Step& step);

  const std::shared_ptr<Link> link_;
  const bool write_;
  const bool staging_;
  const uint64_t user_data_;
  const std::chrono::steady_clock::time_point due_;
  std::vector<Step> steps_;  // the last is to be done first
  std::atomic<TransferState> state_{TransferState::WAITING};
  std::atomic<bool> hangs_{false};
};

struct TransferReport {
  uint64_t request;
  uint64_t user_data;
  TransferState state;
};

// The asynchronous transfers of one engine that nobody knows the end of yet.
class Requests {
 public:
  ~Requests() { end(); }
  // Nothing moves any more. May be repeated.
  void end();
  // Begins a transfer. Returns its number, 0 if there are too many under way.
  uint64_t submit(const std::shared_ptr<Transfer>& transfer);
  // It goes on though nobody may ask for it.
  void abandon(const std::shared_ptr<Transfer>& transfer);
  // A transfer's state, none if there is no such request. One that is over is forgotten.
  std::optional<TransferState> poll(uint64_t request);
  // The states of all transfers, the oldest first.
  std::vector<TransferReport> poll_all(uint32_t max_count, bool skip_waiting);
  // A link was disconnected: nobody may ask for its transfers any more.
  void forget(const Link* link);

 private:
  void work();

  std::mutex mutex_;
  std::condition_variable changed_;
  std::map<uint64_t, std::shared_ptr<Transfer>> transfers_;
  std::deque<std::shared_ptr<Transfer>> abandoned_;
  uint64_t next_ = 1;
  bool ended_ = false;
  std::thread worker_;
};

}  // namespace ascend_sim::hixl
