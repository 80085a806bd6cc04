// SPDX-License-Identifier: Apache-2.0
// Python face of what connections need.

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "bindings.h"
#include "stream_socket.h"

namespace llmdd {
namespace {

struct Bytes {
  std::string value;
};

}  // namespace

template <>
struct To<Bytes> {
  static PyRef make(const Bytes& bytes) {
    const auto size = static_cast<Py_ssize_t>(bytes.value.size());
    return PyRef::take(PyBytes_FromStringAndSize(bytes.value.data(), size));
  }
};

namespace {

// Less than a second, as the wait is a timespec without seconds.
constexpr int64_t kMaxPatience = 999'999'999;

std::shared_ptr<StreamSocket> make_socket(int32_t epoll, int32_t socket, uint64_t events) {
  return std::make_shared<StreamSocket>(epoll, socket, static_cast<uint32_t>(events));
}
void socket_watch(const Held<StreamSocket>& socket, uint64_t events) {
  socket->watch(static_cast<uint32_t>(events));
}
bool socket_begin_reading(const Held<StreamSocket>& socket) { return socket->begin_reading(); }
void socket_wait_to_read(const Held<StreamSocket>& socket) { socket->wait_to_read(); }
void socket_end_reading(const Held<StreamSocket>& socket, bool at_boundary) {
  socket->end_reading(at_boundary);
}
std::optional<Bytes> socket_take(const Held<StreamSocket>& socket, uint64_t number,
                                 int64_t patience_ns) {
  check_value(patience_ns >= 0 && patience_ns <= kMaxPatience, "patience_ns=", patience_ns,
              " is not within 0 and ", kMaxPatience);
  std::optional<std::string> answer = socket->take(number, patience_ns);
  if (!answer) return std::nullopt;
  return Bytes{std::move(*answer)};
}
void socket_confirm(const Held<StreamSocket>& socket, uint64_t number) { socket->confirm(number); }
std::vector<Bytes> socket_unconfirmed(const Held<StreamSocket>& socket, int64_t age_ns) {
  std::vector<Bytes> messages;
  for (std::string& message : socket->unconfirmed(age_ns)) {
    messages.push_back({std::move(message)});
  }
  return messages;
}
bool socket_waits(const Held<StreamSocket>& socket) { return socket->waits(); }
void socket_close(const Held<StreamSocket>& socket) { socket->close(); }

}  // namespace

void bind_net(Module& module) {
  Class<StreamSocket>("StreamSocket",
                      "A stream socket that one thread reads; others may take their answers.")
      .constructor<&make_socket>({{"epoll"}, {"socket"}, {"events"}})
      .method<&socket_watch>("watch", {{"events"}}, "Has epoll wait for these events.", Gil::kKeep)
      .method<&socket_begin_reading>("begin_reading", {},
                                     "Whether the I/O thread may read: no other takes its answer.",
                                     Gil::kKeep)
      .method<&socket_wait_to_read>("wait_to_read", {}, "Waits until it may, and begins.")
      .method<&socket_end_reading>("end_reading", {{"at_boundary"}},
                                   "What has been read ends with a whole message, or not.",
                                   Gil::kKeep)
      .method<&socket_take>("take", {{"number"}, {"patience_ns"}},
                            "Takes the answer to a request out of the socket; None for none.")
      .method<&socket_confirm>("confirm", {{"number"}}, "The answer has been dealt with.",
                               Gil::kKeep)
      .method<&socket_unconfirmed>("unconfirmed", {{"age_ns"}},
                                   "Answers that were taken so long ago and not confirmed.",
                                   Gil::kKeep)
      .property<&socket_waits>("waits", "Whether there are answers that were not confirmed yet.")
      .method<&socket_close>("close", {}, "Nobody takes anything any more. Idempotent.")
      .finish(module);
}

}  // namespace llmdd
