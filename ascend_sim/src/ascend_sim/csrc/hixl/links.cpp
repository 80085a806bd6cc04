// SPDX-License-Identifier: Apache-2.0
#include "links.h"

#include <unistd.h>

#include <utility>

namespace ascend_sim::hixl {

std::shared_ptr<Link> Link::dial(const std::string& remote, const Options& options,
                                 const LocalMemory& memory, const Deadline& deadline) {
  if (deadline.budget_ms() < kMinConnectMs) {
    throw TimedOut("connecting takes at least 200 ms");
  }
  const std::shared_ptr<Link> link(
      new Link(remote, ascend_sim::hixl::dial(parse_engine(remote), deadline)));
  const int device = link->greet(memory, deadline);
  if (start_time(link->pid_) != link->start_) {
    throw IoError(
        "process " + std::to_string(link->pid_) +
        " of that engine cannot be seen from here: the simulated engine reaches processes "
        "of one machine and one pid namespace only");
  }
  if (options.is_hccl() && device == memory.device_of_machine()) {
    throw IoError("both engines are on device " + std::to_string(device) +
                  ", which HCCL can't connect; LocalCommRes version 1.3 can");
  }
  return link;
}

// Returns the device of the machine that the peer's engine is on.
int Link::greet(const LocalMemory& memory, const Deadline& deadline) {
  connection_.send(Writer(Kind::kHello).text(remote_), deadline);
  Reader welcome = connection_.receive(deadline);
  const Kind kind = welcome.kind();
  if (kind != Kind::kWelcome) {
    throw IoError(kind == Kind::kRefused ? welcome.text() : "it is no engine");
  }
  pid_ = static_cast<int>(welcome.number());
  start_ = welcome.number();
  word_address_ = welcome.number();
  const int device = static_cast<int>(welcome.number());
  std::vector<Range> ranges(std::min<uint64_t>(welcome.number(), 1 << 20));
  for (Range& range : ranges) {
    range.address = welcome.number();
    range.length = welcome.number();
    range.is_device = welcome.number() != 0;
    range.alias = welcome.number();
  }
  theirs_ = Ranges(std::move(ranges));
  local_ = memory.ranges();
  return device;
}

bool Link::lost() {
  if (lost_) {
    return true;
  }
  const std::unique_lock lock(talking_, std::try_to_lock);
  // A link brings nothing unasked: readable while nobody asks means that it has ended. Who talks
  // will see it.
  return lock.owns_lock() && connection_.is_readable();
}

const Ranges* Link::theirs() {
  if (lost() || start_time(pid_) != start_) {
    return nullptr;
  }
  // Read one-sidedly too: a peer whose program sleeps can be read and written.
  uint64_t word = 0;
  const AscendSimPiece piece{reinterpret_cast<uint64_t>(&word), word_address_, sizeof word};
  const bool is_there = ascend_sim_remote_copy(pid_, 0, &piece, 1) == 0;
  return is_there && word == LocalMemory::kAlive ? &theirs_ : nullptr;
}

bool Link::close(const Deadline& deadline) {
  std::unique_lock lock(moving_, deadline.left());
  if (!lock.owns_lock()) {
    return false;
  }
  {
    const std::lock_guard closing(closing_);
    closed_ = true;
  }
  closed_now_.notify_all();
  connection_.shut_down();
  return true;
}

void Link::wait_until_closed(const Deadline& deadline) {
  std::unique_lock lock(closing_);
  closed_now_.wait_for(lock, deadline.left(), [this] { return closed_.load(); });
}

bool Link::move(bool write, std::vector<AscendSimPiece> pieces) {
  const Ranges* ranges = theirs();
  if (ranges == nullptr) {
    return false;
  }
  for (AscendSimPiece& piece : pieces) {
    piece.remote = ranges->alias(piece.remote, piece.length);
  }
  int error = ascend_sim_fault("hixl.step");
  if (error == 0) {
    error = ascend_sim_remote_copy(pid_, write ? 1 : 0, pieces.data(), pieces.size());
  }
  if (error != 0) {
    log_error("%s: moving bytes failed with error %d", remote_.c_str(), error);
  }
  return error == 0;
}

bool Link::notify(const std::string& name, const std::string& text, const Deadline& deadline) {
  const std::lock_guard lock(talking_);
  if (lost_) {
    throw IoError("the link is lost");
  }
  try {
    connection_.send(Writer(Kind::kNotify).text(name).text(text), deadline);
    Reader answer = connection_.receive(deadline);
    if (answer.kind() != Kind::kKept) {
      throw IoError("an answer to something else");
    }
    return answer.number() != 0;
  } catch (...) {
    // An answer that comes later must not be taken for that of another question.
    lost_ = true;
    throw;
  }
}

Links::Links(std::string engine, const Options& options, const LocalMemory& memory,
             std::function<void(const Link*)> forget)
    : engine_(std::move(engine)), options_(options), memory_(memory), forget_(std::move(forget)) {
  if (options_.auto_connect) {
    ++background_;
    std::thread([this] { beat(); }).detach();
  }
}

Links::~Links() {
  end();
  std::unique_lock lock(mutex_);
  changed_.wait(lock, [this] { return background_ == 0; });
}

void Links::end() {
  std::map<std::string, std::shared_ptr<Link>> links;
  {
    const std::lock_guard lock(mutex_);
    ended_ = true;
    links = links_;
  }
  changed_.notify_all();
  for (const auto& [remote, link] : links) {
    link->close(Deadline::never());  // a step that moves bytes is short
    remove(link);
  }
}

bool Links::busy() {
  const std::lock_guard lock(mutex_);
  return !links_.empty() || !dialing_.empty();
}

std::shared_ptr<Link> Links::find(const std::string& remote) {
  const std::lock_guard lock(mutex_);
  const auto found = links_.find(remote);
  return found == links_.end() ? nullptr : found->second;
}

uint32_t Links::reach(const std::string& remote, const Deadline& deadline,
                      std::shared_ptr<Link>* link) {
  *link = find(remote);
  if (*link != nullptr) {
    return kSuccess;
  }
  if (!options_.auto_connect) {
    return kNotConnected;
  }
  {
    std::unique_lock lock(mutex_);
    changed_.wait_for(lock, deadline.left(), [&] { return dialing_.count(remote) == 0; });
  }
  const uint32_t status = connect(remote, deadline);
  if (status != kSuccess && status != kAlreadyConnected) {
    return status;
  }
  *link = find(remote);
  return *link == nullptr ? kNotConnected : kSuccess;
}

uint32_t Links::connect(const std::string& remote, const Deadline& deadline) {
  const uint32_t status = reserve(remote);
  return status != kSuccess ? status : make(remote, deadline, false);
}

uint32_t Links::connect_async(const std::string& remote, const Deadline& deadline) {
  const uint32_t status = reserve(remote);
  if (status == kSuccess) {
    begin(remote, State::CONNECT_PENDING, [this, remote, deadline] {
      set_state(remote, State::CONNECTING);
      make(remote, deadline, true);
    });
  }
  return status;
}

uint32_t Links::disconnect(const std::string& remote, const Deadline& deadline) {
  const std::shared_ptr<Link> link = find(remote);
  if (link == nullptr) {
    return kNotConnected;
  }
  if (!link->close(deadline)) {
    return kTimeout;
  }
  remove(link);
  return kSuccess;
}

uint32_t Links::disconnect_async(const std::string& remote, const Deadline& deadline) {
  if (find(remote) == nullptr) {
    return kNotConnected;
  }
  begin(remote, State::DISCONNECT_PENDING, [this, remote, deadline] {
    set_state(remote, State::DISCONNECTING);
    disconnect(remote, deadline);
    const std::lock_guard lock(mutex_);
    states_.erase(remote);
  });
  return kSuccess;
}

Links::State Links::state(const std::string& remote) {
  const auto all = states();
  const auto found = all.find(remote);
  return found == all.end() ? State::NOT_CONNECT : found->second;
}

std::map<std::string, Links::State> Links::states() {
  const std::lock_guard lock(mutex_);
  std::map<std::string, State> all = states_;
  for (const auto& [remote, link] : links_) {
    all.emplace(remote, State::CONNECTED);
  }
  return all;
}

// Claims a peer's name for one connect.
uint32_t Links::reserve(const std::string& remote) {
  try {
    if (parse_engine(remote).port == 0 || remote == engine_) {
      throw BadArgument(remote + " can't be connected to from " + engine_);
    }
  } catch (const BadArgument& error) {
    log_error("connect: %s", error.what());
    return kParamInvalid;
  }
  const std::lock_guard lock(mutex_);
  if (links_.count(remote) != 0 || dialing_.count(remote) != 0) {
    return kAlreadyConnected;
  }
  if (links_.size() + dialing_.size() >= limits().links && !options_.client_server) {
    log_error("connect: no more links without LocalCommRes 1.3");
    return kResourceExhausted;
  }
  dialing_[remote] = true;
  return kSuccess;
}

uint32_t Links::make(const std::string& remote, const Deadline& deadline, bool is_background) {
  std::shared_ptr<Link> link;
  uint32_t status = kSuccess;
  try {
    link = Link::dial(remote, options_, memory_, deadline);
  } catch (const TimedOut& error) {
    status = kTimeout;
    log_error("connect: %s: %s", remote.c_str(), error.what());
  } catch (const std::runtime_error& error) {
    status = kFailed;
    log_error("connect: %s: %s", remote.c_str(), error.what());
  }
  {
    const std::lock_guard lock(mutex_);
    if (link != nullptr && !ended_) {
      links_[remote] = std::exchange(link, nullptr);
    }
    states_.erase(remote);
    if (status != kSuccess && is_background) {
      states_[remote] = State::CONNECT_FAILED;
    }
    dialing_.erase(remote);
  }
  changed_.notify_all();
  // Made, and the engine was finalized meanwhile.
  return link != nullptr ? kFailed : status;
}

void Links::begin(const std::string& remote, State state, std::function<void()> work) {
  {
    const std::lock_guard lock(mutex_);
    states_[remote] = state;
    ++background_;
  }
  std::thread([this, work = std::move(work)] {
    name_thread("hixl-connect");
    work();
    const std::lock_guard lock(mutex_);
    --background_;
    changed_.notify_all();
  }).detach();
}

void Links::set_state(const std::string& remote, State state) {
  const std::lock_guard lock(mutex_);
  states_[remote] = state;
}

void Links::remove(const std::shared_ptr<Link>& link) {
  {
    const std::lock_guard lock(mutex_);
    const auto found = links_.find(link->remote());
    if (found != links_.end() && found->second == link) {
      links_.erase(found);
    }
  }
  forget_(link.get());
}

void Links::beat() {
  name_thread("hixl-heartbeat");
  const std::chrono::milliseconds interval(limits().heartbeat_ms);
  std::unique_lock lock(mutex_);
  while (!changed_.wait_for(lock, interval, [this] { return ended_; })) {
    std::vector<std::shared_ptr<Link>> lost;
    for (const auto& [remote, link] : links_) {
      if (link->lost()) {
        lost.push_back(link);
      }
    }
    lock.unlock();
    for (const std::shared_ptr<Link>& link : lost) {
      link->close(Deadline::never());
      remove(link);
    }
    lock.lock();
  }
  --background_;
  changed_.notify_all();
}

}  // namespace ascend_sim::hixl
