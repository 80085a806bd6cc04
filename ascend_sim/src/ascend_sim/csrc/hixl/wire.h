// SPDX-License-Identifier: Apache-2.0
// Control messages between engines: frames with their length in front, over TCP.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

#include "common.h"

namespace ascend_sim::hixl {

enum class Kind : uint8_t { kHello = 1, kNotify, kWelcome, kRefused, kKept };

// Builds one message.
class Writer {
 public:
  explicit Writer(Kind kind) { bytes_.push_back(static_cast<char>(kind)); }
  Writer& number(uint64_t value);
  Writer& text(std::string_view value);
  const std::string& bytes() const { return bytes_; }

 private:
  std::string bytes_;
};

// Takes one apart. Throws IoError if it is none.
class Reader {
 public:
  explicit Reader(std::string bytes) : bytes_(std::move(bytes)) {}
  Kind kind();
  uint64_t number();
  std::string text();

 private:
  const char* take(size_t count);

  std::string bytes_;
  size_t at_ = 0;
};

// A connected socket. Throws TimedOut and IoError.
class Connection {
 public:
  explicit Connection(int descriptor) : descriptor_(descriptor) {}
  ~Connection();
  Connection(const Connection&) = delete;
  Connection& operator=(const Connection&) = delete;

  void send(const Writer& message, const Deadline& deadline);
  Reader receive(const Deadline& deadline);
  // Whether it was closed by the other side, or something came that nobody has asked for.
  bool is_readable() const;
  // Whoever waits on it wakes up with an IoError.
  void shut_down();

 private:
  std::string receive_bytes(size_t count, const Deadline& deadline);
  void wait_for(short events, const Deadline& deadline);

  int descriptor_;
};

struct Address {
  std::string host;
  uint16_t port;
};

// A connected socket's descriptor.
int dial(const Address& address, const Deadline& deadline);
// A listening socket's.
int listen_at(const Address& address);

}  // namespace ascend_sim::hixl
