// SPDX-License-Identifier: Apache-2.0
#include "wire.h"

#include <arpa/inet.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

namespace ascend_sim::hixl {
namespace {

constexpr uint32_t kMaxBytes = 64 << 20;

IoError failed(const char* what) { return IoError(std::string(what) + ": " + strerror(errno)); }

struct SocketAddress {
  sockaddr_storage storage{};
  socklen_t length;
  int family;

  explicit SocketAddress(const Address& address) {
    if (address.host.find(':') != std::string::npos) {
      auto* six = reinterpret_cast<sockaddr_in6*>(&storage);
      six->sin6_family = AF_INET6;
      six->sin6_port = htons(address.port);
      inet_pton(AF_INET6, address.host.c_str(), &six->sin6_addr);
      length = sizeof *six;
    } else {
      auto* four = reinterpret_cast<sockaddr_in*>(&storage);
      four->sin_family = AF_INET;
      four->sin_port = htons(address.port);
      inet_pton(AF_INET, address.host.c_str(), &four->sin_addr);
      length = sizeof *four;
    }
    family = storage.ss_family;
  }
  const sockaddr* get() const { return reinterpret_cast<const sockaddr*>(&storage); }
};

int new_socket(int family) {
  const int made = socket(family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
  if (made < 0) {
    throw failed("socket");
  }
  return made;
}

}  // namespace

Writer& Writer::number(uint64_t value) {
  bytes_.append(reinterpret_cast<const char*>(&value), sizeof value);
  return *this;
}

Writer& Writer::text(std::string_view value) {
  number(value.size());
  bytes_.append(value);
  return *this;
}

const char* Reader::take(size_t count) {
  if (count > bytes_.size() - at_) {
    throw IoError("what came is no message");
  }
  at_ += count;
  return bytes_.data() + at_ - count;
}

Kind Reader::kind() { return static_cast<Kind>(*take(1)); }

uint64_t Reader::number() {
  uint64_t value;
  std::memcpy(&value, take(sizeof value), sizeof value);
  return value;
}

std::string Reader::text() {
  const uint64_t length = number();
  return {take(length), length};
}

Connection::~Connection() { close(descriptor_); }

void Connection::wait_for(short events, const Deadline& deadline) {
  pollfd one{descriptor_, events, 0};
  while (true) {
    const int ready = poll(&one, 1, deadline.left_ms());
    if (ready > 0) {
      return;
    }
    if (ready == 0) {
      throw TimedOut("no answer in time");
    }
    if (errno != EINTR) {
      throw failed("poll");
    }
  }
}

void Connection::send(const Writer& message, const Deadline& deadline) {
  const uint32_t length = htonl(static_cast<uint32_t>(message.bytes().size()));
  std::string data(reinterpret_cast<const char*>(&length), sizeof length);
  data += message.bytes();
  for (size_t done = 0; done < data.size();) {
    const ssize_t sent = ::send(descriptor_, data.data() + done, data.size() - done, MSG_NOSIGNAL);
    if (sent >= 0) {
      done += static_cast<size_t>(sent);
    } else if (errno == EAGAIN) {
      wait_for(POLLOUT, deadline);
    } else if (errno != EINTR) {
      throw failed("send");
    }
  }
}

Reader Connection::receive(const Deadline& deadline) {
  uint32_t length;
  std::memcpy(&length, receive_bytes(sizeof length, deadline).data(), sizeof length);
  length = ntohl(length);
  if (length == 0 || length > kMaxBytes) {
    throw IoError("a message of " + std::to_string(length) + " bytes");
  }
  return Reader(receive_bytes(length, deadline));
}

std::string Connection::receive_bytes(size_t count, const Deadline& deadline) {
  std::string data(count, '\0');
  for (size_t done = 0; done < count;) {
    const ssize_t got = recv(descriptor_, data.data() + done, count - done, 0);
    if (got > 0) {
      done += static_cast<size_t>(got);
    } else if (got == 0) {
      throw IoError("the connection was closed");
    } else if (errno == EAGAIN) {
      wait_for(POLLIN, deadline);
    } else if (errno != EINTR) {
      throw failed("recv");
    }
  }
  return data;
}

bool Connection::is_readable() const {
  pollfd one{descriptor_, POLLIN, 0};
  return poll(&one, 1, 0) != 0;
}

void Connection::shut_down() { shutdown(descriptor_, SHUT_RDWR); }

int dial(const Address& address, const Deadline& deadline) {
  const SocketAddress to(address);
  const int made = new_socket(to.family);
  try {
    const int yes = 1;
    setsockopt(made, IPPROTO_TCP, TCP_NODELAY, &yes, sizeof yes);
    if (connect(made, to.get(), to.length) != 0) {
      if (errno != EINPROGRESS) {
        throw failed("connect");
      }
      pollfd one{made, POLLOUT, 0};
      int ready;
      do {
        ready = poll(&one, 1, deadline.left_ms());
      } while (ready < 0 && errno == EINTR);
      if (ready == 0) {
        throw TimedOut("nobody answers");
      }
      socklen_t size = sizeof errno;
      getsockopt(made, SOL_SOCKET, SO_ERROR, &errno, &size);
      if (errno != 0) {
        throw failed("connect");
      }
    }
  } catch (...) {
    close(made);
    throw;
  }
  return made;
}

int listen_at(const Address& address) {
  const SocketAddress at(address);
  const int made = new_socket(at.family);
  const int yes = 1;
  setsockopt(made, SOL_SOCKET, SO_REUSEADDR, &yes, sizeof yes);
  if (bind(made, at.get(), at.length) != 0 || listen(made, 128) != 0) {
    const IoError error = failed("listen");
    close(made);
    throw error;
  }
  return made;
}

}  // namespace ascend_sim::hixl
