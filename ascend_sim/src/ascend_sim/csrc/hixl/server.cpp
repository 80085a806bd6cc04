// SPDX-License-Identifier: Apache-2.0
#include "server.h"

#include <fcntl.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

namespace ascend_sim::hixl {

bool Inbox::put(uint64_t link, Notify notify) {
  const std::lock_guard lock(mutex_);
  size_t& count = counts_[link];
  if (count >= kMaxUnreadNotifies) {
    return false;
  }
  ++count;
  unread_.push_back(std::move(notify));
  return true;
}

std::vector<Notify> Inbox::take() {
  const std::lock_guard lock(mutex_);
  counts_.clear();
  return std::exchange(unread_, {});
}

Server::Server(std::string engine, const Address& address, const LocalMemory& memory)
    : engine_(std::move(engine)), memory_(memory), listener_(listen_at(address)) {
  if (pipe2(wake_, O_CLOEXEC) != 0) {
    close(listener_);
    throw IoError("no pipe");
  }
  thread_ = std::thread([this] { accept_peers(); });
}

void Server::stop() {
  if (!thread_.joinable()) {
    return;
  }
  close(wake_[1]);
  thread_.join();
  close(wake_[0]);
  close(listener_);
  {
    const std::lock_guard lock(mutex_);
    for (Session& session : sessions_) {
      session.connection.shut_down();
    }
  }
  for (Session& session : sessions_) {
    session.thread.join();
  }
}

bool Server::busy() {
  const std::lock_guard lock(mutex_);
  for (const Session& session : sessions_) {
    if (session.is_link && !session.ended) {
      return true;
    }
  }
  return false;
}

void Server::accept_peers() {
  name_thread("hixl-server");
  pollfd both[] = {{listener_, POLLIN, 0}, {wake_[0], POLLIN, 0}};
  for (uint64_t number = 1;; ++number) {
    if (poll(both, 2, -1) < 0) {
      continue;
    }
    if (both[1].revents != 0) {
      return;
    }
    const int descriptor = accept4(listener_, nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK);
    join_ended();
    if (descriptor < 0) {
      continue;
    }
    const std::lock_guard lock(mutex_);
    Session& session = sessions_.emplace_back(descriptor);
    session.thread = std::thread([this, &session, number] { serve(&session, number); });
  }
}

void Server::join_ended() {
  const std::lock_guard lock(mutex_);
  for (auto session = sessions_.begin(); session != sessions_.end();) {
    if (session->ended) {
      session->thread.join();
      session = sessions_.erase(session);
    } else {
      ++session;
    }
  }
}

void Server::serve(Session* session, uint64_t number) {
  name_thread("hixl-session");
  try {
    while (true) {
      Reader message = session->connection.receive(Deadline::never());
      session->connection.send(answer(session, number, std::move(message)), Deadline::never());
    }
  } catch (const std::runtime_error&) {
    // The peer has gone, or the engine is being finalized.
  }
  session->connection.shut_down();
  const std::lock_guard lock(mutex_);
  session->ended = true;
}

Writer Server::answer(Session* session, uint64_t number, Reader message) {
  switch (message.kind()) {
    case Kind::kHello: {
      const std::string wanted = message.text();
      if (wanted != engine_) {
        return Writer(Kind::kRefused).text("this engine is " + engine_ + ", not " + wanted);
      }
      // From here on nothing is deregistered; what is registered is told in one piece.
      {
        const std::lock_guard lock(mutex_);
        session->is_link = true;
      }
      Writer welcome(Kind::kWelcome);
      welcome.number(static_cast<uint64_t>(getpid()))
          .number(start_time(getpid()))
          .number(memory_.word_address())
          .number(static_cast<uint64_t>(memory_.device_of_machine()));
      const auto ranges = memory_.ranges();
      welcome.number(ranges->all().size());
      for (const Range& range : ranges->all()) {
        welcome.number(range.address).number(range.length).number(range.is_device);
        welcome.number(range.alias);
      }
      return welcome;
    }
    case Kind::kNotify: {
      std::string name = message.text();
      const bool kept = inbox_.put(number, {std::move(name), message.text()});
      return Writer(Kind::kKept).number(kept);
    }
    default:
      throw IoError("what is this?");
  }
}

}  // namespace ascend_sim::hixl
