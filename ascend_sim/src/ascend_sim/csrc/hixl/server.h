// SPDX-License-Identifier: Apache-2.0
// What an engine tells its peers: where its registered memory is. And the notifies they send.
#pragma once

#include <deque>
#include <list>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "memory.h"
#include "wire.h"

namespace ascend_sim::hixl {

using Notify = std::pair<std::string, std::string>;

// Notifies that nobody has read yet.
class Inbox {
 public:
  // Keeps a notify, unless too many of this link are unread.
  bool put(uint64_t link, Notify notify);
  // All unread ones, in the order of arrival.
  std::vector<Notify> take();

 private:
  std::mutex mutex_;
  std::vector<Notify> unread_;
  std::map<uint64_t, size_t> counts_;
};

// Listens on the engine's address; one thread per link of a peer.
class Server {
 public:
  // Throws IoError: the address can't be had.
  Server(std::string engine, const Address& address, const LocalMemory& memory);
  ~Server() { stop(); }
  // Stops to listen, and ends the links of all peers. May be repeated.
  void stop();

  // Whether a peer is connected.
  bool busy();
  Inbox& inbox() { return inbox_; }

 private:
  struct Session {
    explicit Session(int descriptor) : connection(descriptor) {}
    Connection connection;
    bool is_link = false;
    bool ended = false;
    std::thread thread;
  };

  void accept_peers();
  void serve(Session* session, uint64_t number);
  Writer answer(Session* session, uint64_t number, Reader message);
  void join_ended();

  const std::string engine_;
  const LocalMemory& memory_;
  Inbox inbox_;
  const int listener_;
  int wake_[2];
  std::mutex mutex_;
  std::list<Session> sessions_;
  std::thread thread_;
};

}  // namespace ascend_sim::hixl
