// SPDX-License-Identifier: Apache-2.0
// A stream socket that one I/O thread reads, and from which a thread that waits for an answer may
// take it by itself. Torch-free, Python-free.

#pragma once

#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

namespace llmdd {

// A waiting thread is woken by its answer itself, not by the I/O thread that has read it: that
// saves the wake-ups of one more thread, and its turn at the interpreter lock, in each request. A
// signal may interrupt the thread before it has dealt with its answer: so answers are kept until
// confirm() says that it has, and the I/O thread deals with those that stay.
//
// Thread safety: begin_reading() to end_reading() belong to the I/O thread, the rest may be called
// from any thread. Nothing here owns the descriptors.
class StreamSocket {
 public:
  // `socket` is registered in `epoll` already, for `events`.
  StreamSocket(int epoll, int socket, uint32_t events)
      : epoll_(epoll), socket_(socket), events_(events) {}

  // Has epoll wait for these events from now on.
  void watch(uint32_t events);

  // Around everything that the I/O thread reads. False while another thread waits for its answer,
  // which is over soon; then wait_to_read() begins instead.
  bool begin_reading();
  void wait_to_read();
  // `at_boundary`: what has been read ends with a whole message.
  void end_reading(bool at_boundary);

  // The answer to request `number`, without its header, if it is there before `patience_ns` have
  // passed, is small, comes without data, and is the next message.
  std::optional<std::string> take(uint64_t number, int64_t patience_ns);
  // The answer has been dealt with.
  void confirm(uint64_t number);
  // Answers that were taken `age_ns` ago or earlier and not confirmed; they are confirmed by this.
  std::vector<std::string> unconfirmed(int64_t age_ns);
  // Whether there are answers that have not been confirmed yet.
  bool waits();

  // Nobody takes anything any more when this returns. To be called before the socket is closed.
  // Idempotent.
  void close();

 private:
  struct Taken {
    uint64_t number;
    int64_t at_ns;
    std::string message;
  };

  bool begin_taking(int64_t deadline_ns);
  void end_taking(const std::optional<Taken>& taken);
  std::optional<std::string> wait_for(uint64_t number, int64_t left_ns) const;
  void set_epoll(uint32_t events) const;

  const int epoll_;
  const int socket_;
  std::mutex mutex_;
  std::condition_variable changed_;
  uint32_t events_;
  bool reading_ = false;
  bool taking_ = false;
  bool closed_ = false;
  bool at_boundary_ = true;
  std::vector<Taken> taken_;  // and not confirmed
};

}  // namespace llmdd
