// SPDX-License-Identifier: Apache-2.0
#include "stream_socket.h"

#include <poll.h>
#include <sys/epoll.h>
#include <sys/socket.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <cstddef>
#include <cstring>
#include <utility>

#include "clock.h"

namespace llmdd {
namespace {

constexpr size_t kTakeBytes = 16384;
// As in net/framing.py: the sizes of the message and of its data, and what says that there is none.
constexpr size_t kHeaderBytes = 8;
constexpr uint32_t kNoData = 0xFFFFFFFF;

uint32_t size_at(const unsigned char* at) {
  uint32_t size = 0;
  std::memcpy(&size, at, sizeof(size));  // little-endian, as the machines that this runs on
  return size;
}

// Reads the beginning of an Envelope of serving/messages.py: an array of three, a number, a bool.
struct EnvelopeHead {
  uint64_t number = 0;
  bool reply = false;
  bool valid = false;

  EnvelopeHead(const unsigned char* at, size_t nbytes) {
    if (nbytes < 3 || at[0] != 0x93) return;
    const unsigned char first = at[1];
    size_t width = 0;
    if (first < 0x80) {
      number = first;
    } else if (first >= 0xCC && first <= 0xCF) {
      width = size_t{1} << (first - 0xCC);
      if (nbytes < 3 + width) return;
      for (size_t i = 0; i < width; ++i) number = number << 8 | at[2 + i];
    } else {
      return;
    }
    const unsigned char flag = at[2 + width];
    valid = flag == 0xC2 || flag == 0xC3;
    reply = flag == 0xC3;
  }
};

// The size of the first message with its header, if it is the answer to request `number`; else 0.
size_t answer_size(const unsigned char* bytes, size_t nbytes, uint64_t number) {
  if (nbytes < kHeaderBytes || size_at(bytes + 4) != kNoData) return 0;
  const size_t message = size_at(bytes);
  if (nbytes - kHeaderBytes < message) return 0;
  const EnvelopeHead head(bytes + kHeaderBytes, message);
  return head.valid && head.reply && head.number == number ? kHeaderBytes + message : 0;
}

}  // namespace

void StreamSocket::set_epoll(uint32_t events) const {
  epoll_event event{};
  event.events = events;
  event.data.fd = socket_;
  // It fails only while the socket is out of the set for a moment, and is then added as it must be.
  (void)epoll_ctl(epoll_, EPOLL_CTL_MOD, socket_, &event);
}

void StreamSocket::watch(uint32_t events) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (closed_) return;
  events_ = events;
  set_epoll(taking_ ? events & ~uint32_t{EPOLLIN} : events);
}

bool StreamSocket::begin_reading() {
  std::lock_guard<std::mutex> lock(mutex_);
  reading_ = !taking_;
  return reading_;
}

void StreamSocket::wait_to_read() {
  std::unique_lock<std::mutex> lock(mutex_);
  changed_.wait(lock, [this] { return !taking_; });
  reading_ = true;
}

void StreamSocket::end_reading(bool at_boundary) {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    reading_ = false;
    at_boundary_ = at_boundary;
  }
  changed_.notify_all();
}

bool StreamSocket::begin_taking(int64_t deadline_ns) {
  std::unique_lock<std::mutex> lock(mutex_);
  const auto left = std::chrono::nanoseconds(deadline_ns - now_ns());
  const bool free =
      changed_.wait_for(lock, left, [this] { return closed_ || (!reading_ && !taking_); });
  if (!free || closed_ || !at_boundary_ || (events_ & EPOLLIN) == 0) return false;
  taking_ = true;
  set_epoll(events_ & ~uint32_t{EPOLLIN});
  return true;
}

void StreamSocket::end_taking(const std::optional<Taken>& taken) {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (taken) taken_.push_back(*taken);
    taking_ = false;
    set_epoll(events_);
  }
  changed_.notify_all();
}

std::optional<std::string> StreamSocket::wait_for(uint64_t number, int64_t left_ns) const {
  const timespec left{0, left_ns > 0 ? left_ns : 0};
  pollfd wanted{socket_, POLLIN, 0};
  // An interrupted wait is given up: the signal's handler has to run.
  if (ppoll(&wanted, 1, &left, nullptr) != 1 || (wanted.revents & POLLIN) == 0) return std::nullopt;
  std::array<unsigned char, kTakeBytes> bytes;
  const ssize_t count = recv(socket_, bytes.data(), bytes.size(), MSG_PEEK | MSG_DONTWAIT);
  if (count <= 0) return std::nullopt;
  const size_t size = answer_size(bytes.data(), static_cast<size_t>(count), number);
  // Nobody else reads meanwhile, so these are the same bytes.
  if (size == 0 || recv(socket_, bytes.data(), size, MSG_DONTWAIT) != static_cast<ssize_t>(size)) {
    return std::nullopt;
  }
  return std::string(reinterpret_cast<const char*>(bytes.data()) + kHeaderBytes,
                     size - kHeaderBytes);
}

std::optional<std::string> StreamSocket::take(uint64_t number, int64_t patience_ns) {
  const int64_t deadline_ns = now_ns() + patience_ns;
  if (!begin_taking(deadline_ns)) return std::nullopt;
  std::optional<std::string> answer = wait_for(number, deadline_ns - now_ns());
  end_taking(answer ? std::optional<Taken>({number, now_ns(), *answer}) : std::nullopt);
  return answer;
}

void StreamSocket::confirm(uint64_t number) {
  std::lock_guard<std::mutex> lock(mutex_);
  const auto is_it = [number](const Taken& taken) { return taken.number == number; };
  taken_.erase(std::remove_if(taken_.begin(), taken_.end(), is_it), taken_.end());
}

std::vector<std::string> StreamSocket::unconfirmed(int64_t age_ns) {
  const int64_t newest_ns = now_ns() - age_ns;
  std::vector<std::string> messages;
  std::lock_guard<std::mutex> lock(mutex_);
  for (auto taken = taken_.begin(); taken != taken_.end();) {
    if (taken->at_ns > newest_ns) {
      ++taken;
    } else {
      messages.push_back(std::move(taken->message));
      taken = taken_.erase(taken);
    }
  }
  return messages;
}

bool StreamSocket::waits() {
  std::lock_guard<std::mutex> lock(mutex_);
  return !taken_.empty();
}

void StreamSocket::close() {
  std::unique_lock<std::mutex> lock(mutex_);
  closed_ = true;
  changed_.notify_all();
  changed_.wait(lock, [this] { return !taking_; });
}

}  // namespace llmdd
