// SPDX-License-Identifier: Apache-2.0
// Links to other engines, of one direction: this side reads and writes, the other answers.
#pragma once

#include <condition_variable>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "memory.h"
#include "options.h"
#include "public.h"
#include "remote_copy.h"
#include "wire.h"

namespace ascend_sim::hixl {

// A link to one peer, from connect to disconnect.
//
// It is lost when the peer has gone or the connection broke: it stays, and transfers on it fail,
// until it is disconnected. What is registered on either side after `dial` can't be reached by it.
class Link {
 public:
  // Throws TimedOut, or IoError: nobody listens there, or it is not the engine that is meant.
  static std::shared_ptr<Link> dial(const std::string& remote, const Options& options,
                                    const LocalMemory& memory, const Deadline& deadline);

  const std::string& remote() const { return remote_; }
  const Ranges& local() const { return *local_; }
  // What the peer had registered when this link was made, NULL if the link is lost.
  const Ranges* theirs();
  bool lost();
  // The connection breaks.
  void drop() { lost_ = true; }
  // Ends the link; when it returns true nothing is written through it any more.
  bool close(const Deadline& deadline);
  bool closed() const { return closed_; }
  // Waits until it is closed, at most until the deadline.
  void wait_until_closed(const Deadline& deadline);
  // Held while bytes move: `close` waits for it.
  std::timed_mutex& moving() { return moving_; }
  // Moves pieces, local aliases with addresses registered there; false if that is impossible.
  bool move(bool write, std::vector<AscendSimPiece> pieces);
  // Leaves a notify with the peer; false if too many are unread there. Throws TimedOut, IoError.
  bool notify(const std::string& name, const std::string& text, const Deadline& deadline);

 private:
  Link(std::string remote, int descriptor) : remote_(std::move(remote)), connection_(descriptor) {}
  int greet(const LocalMemory& memory, const Deadline& deadline);

  const std::string remote_;
  Connection connection_;
  std::shared_ptr<const Ranges> local_;
  Ranges theirs_;
  int pid_ = 0;
  uint64_t start_ = 0;
  uint64_t word_address_ = 0;
  std::atomic<bool> lost_{false};
  std::atomic<bool> closed_{false};
  std::timed_mutex moving_;
  std::mutex talking_;  // held for one question and its answer
  std::mutex closing_;
  std::condition_variable closed_now_;
};

// All links of one engine: connect and disconnect, now or in the background, and the heartbeat.
class Links {
 public:
  using State = ::hixl::AsyncConnectStatus;

  // `forget` is called with each link that has ended.
  Links(std::string engine, const Options& options, const LocalMemory& memory,
        std::function<void(const Link*)> forget);
  ~Links();
  // Ends all links. May be repeated.
  void end();

  // Whether there is a link, lost or not, or one is being made.
  bool busy();
  // The link to a peer, lost or not, or NULL.
  std::shared_ptr<Link> find(const std::string& remote);
  // The link to a peer, made now if the engine connects by itself; or why there is none.
  uint32_t reach(const std::string& remote, const Deadline& deadline, std::shared_ptr<Link>* link);
  uint32_t connect(const std::string& remote, const Deadline& deadline);
  uint32_t connect_async(const std::string& remote, const Deadline& deadline);
  uint32_t disconnect(const std::string& remote, const Deadline& deadline);
  uint32_t disconnect_async(const std::string& remote, const Deadline& deadline);
  State state(const std::string& remote);
  std::map<std::string, State> states();

 private:
  uint32_t reserve(const std::string& remote);
  uint32_t make(const std::string& remote, const Deadline& deadline, bool is_background);
  void begin(const std::string& remote, State state, std::function<void()> work);
  void set_state(const std::string& remote, State state);
  void remove(const std::shared_ptr<Link>& link);
  void beat();

  const std::string engine_;
  const Options options_;
  const LocalMemory& memory_;
  const std::function<void(const Link*)> forget_;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::map<std::string, std::shared_ptr<Link>> links_;
  std::map<std::string, bool> dialing_;
  std::map<std::string, State> states_;
  bool ended_ = false;
  int background_ = 0;  // threads at work
};

}  // namespace ascend_sim::hixl
