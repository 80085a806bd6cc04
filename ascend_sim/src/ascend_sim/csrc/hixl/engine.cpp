// SPDX-License-Identifier: Apache-2.0
#include "engine.h"

#include <unistd.h>

#include <set>

#include "acl/acl.h"

namespace ascend_sim::hixl {
namespace {

uint64_t current_context() {
  aclrtContext context = nullptr;
  return aclrtGetCurrentContext(&context) == ACL_SUCCESS ? reinterpret_cast<uint64_t>(context) : 0;
}

// Whether this thread's device is there: fault injection may have taken it away.
bool device_answers() {
  size_t free = 0, total = 0;
  return aclrtGetMemInfo(ACL_HBM_MEM, &free, &total) == ACL_SUCCESS;
}

size_t characters(const std::string& text) {  // of UTF-8
  return static_cast<size_t>(
      std::count_if(text.begin(), text.end(), [](char c) { return (c & 0xC0) != 0x80; }));
}

unsigned long long printed(uint64_t value) { return value; }

// Whether the memory of a transfer is fit for it.
uint32_t check(Link& link, const Options& options, const Ranges& registered,
               const std::vector<AscendSimPiece>& pieces, bool staging) {
  if (pieces.empty()) {
    log_error("a transfer of no pieces");
    return kParamInvalid;
  }
  const Ranges* theirs = link.theirs();
  if (theirs == nullptr) {
    log_error("%s: the link is lost", link.remote().c_str());
    return kFailed;
  }
  std::set<std::pair<bool, bool>> kinds;
  for (const AscendSimPiece& piece : pieces) {
    const uint64_t end = std::max(piece.local, piece.remote) + piece.length;
    if (piece.local == 0 || piece.remote == 0 || piece.length == 0 || end < piece.length) {
      log_error("%llu bytes at %#llx, remote %#llx: not a range", printed(piece.length),
                printed(piece.local), printed(piece.remote));
      return kParamInvalid;
    }
    const Range* here = link.local().holding(piece.local, piece.length);
    // With a pool of buffers, what is not registered at all is taken for host memory.
    if (here == nullptr && (!staging || registered.overlap(piece.local, piece.length) != nullptr)) {
      log_error("%llu bytes at %#llx were not registered before connect", printed(piece.length),
                printed(piece.local));
      return kParamInvalid;
    }
    const Range* there = theirs->holding(piece.remote, piece.length);
    if (there == nullptr) {
      log_error("%llu bytes at %#llx were not registered there before connect",
                printed(piece.length), printed(piece.remote));
      return kParamInvalid;
    }
    kinds.emplace(here != nullptr && here->is_device, there->is_device);
  }
  if (options.fabric_mem && kinds.size() > 1) {
    log_error("with fabric memory all pieces of a transfer must be of one kind");
    return kParamInvalid;
  }
  return kSuccess;
}

}  // namespace

// What an engine has from initialize to finalize.
struct Engine::Core {
  Core(const std::string& name, const Options& given)
      : options(given),
        pid(getpid()),
        context(current_context()),
        memory(ascend_sim_current_device()),
        links(name, options, memory, [this](const Link* link) { requests.forget(link); }) {
    const Address address = parse_engine(name);
    if (address.port != 0) {
      server = std::make_unique<Server>(name, address, memory);
    }
  }

  void end() {
    links.end();
    requests.end();
    memory.end();
    if (server != nullptr) {
      server->stop();
    }
  }

  bool connected() { return links.busy() || (server != nullptr && server->busy()); }

  uint32_t prepare(const std::shared_ptr<Link>& link, bool write,
                   const std::vector<AscendSimPiece>& pieces, bool staging, uint64_t user_data,
                   std::shared_ptr<Transfer>* transfer) {
    const uint32_t status = check(*link, options, *memory.ranges(), pieces, staging);
    if (status != kSuccess) {
      return status;
    }
    if (!device_answers()) {
      log_error("the device does not answer");
      return kFailed;
    }
    *transfer = std::make_shared<Transfer>(link, write, pieces, staging, user_data);
    if (ascend_sim_fault("hixl.link") != 0) {
      link->drop();
    }
    const auto code = static_cast<uint32_t>(ascend_sim_fault("hixl.move"));
    if (code == kTimeout) {
      (*transfer)->hang();
    } else if (code != 0) {
      (*transfer)->fail();
    }
    return kSuccess;
  }

  // In the order in which they may be destroyed, the last first.
  const Options options;
  const int pid;
  const uint64_t context;
  LocalMemory memory;
  Requests requests;
  Links links;
  std::unique_ptr<Server> server;
};

uint32_t Engine::initialize(const std::string& name,
                            const std::map<std::string, std::string>& options) {
  const std::lock_guard lock(mutex_);
  if (core_ != nullptr) {
    return kSuccess;
  }
  if (current_context() == 0) {
    log_error("initialize: this thread has no AscendCL context: set the device");
    return kFailed;
  }
  const int fault = ascend_sim_fault("hixl.initialize");
  if (fault != 0) {
    return static_cast<uint32_t>(fault);
  }
  ascend_sim_allow_remote_copies();
  try {
    core_ = std::make_shared<Core>(name, Options::parse(options));
  } catch (const BadArgument& error) {
    log_error("initialize: %s", error.what());
    return kParamInvalid;
  } catch (const std::runtime_error& error) {
    log_error("initialize: cannot listen on %s: %s", name.c_str(), error.what());
    return kFailed;
  }
  return kSuccess;
}

void Engine::finalize() {
  std::shared_ptr<Core> core;
  {
    const std::lock_guard lock(mutex_);
    core.swap(core_);
  }
  if (core != nullptr && core->pid != getpid()) {
    new std::shared_ptr<Core>(std::move(core));  // a forked child has none of its threads
  } else if (core != nullptr) {
    core->end();  // calls under way keep it in memory
  }
}

std::shared_ptr<Engine::Core> Engine::enter(const char* function, uint32_t* status) {
  std::shared_ptr<Core> core;
  {
    const std::lock_guard lock(mutex_);
    core = core_;
  }
  *status = kFailed;
  if (core == nullptr || core->pid != getpid()) {
    log_error("%s: the engine is not initialized in this process", function);
    return nullptr;
  }
  if (current_context() != core->context) {
    log_error(
        "%s: this thread does not have the AscendCL context of the thread that initialized the "
        "engine: set the device in every thread that calls it",
        function);
    return nullptr;
  }
  *status = static_cast<uint32_t>(ascend_sim_fault((std::string("hixl.") + function).c_str()));
  return *status == kSuccess ? core : nullptr;
}

std::shared_ptr<Engine::Core> Engine::enter_for(const char* function, int32_t timeout_ms,
                                                uint32_t* status) {
  std::shared_ptr<Core> core = enter(function, status);
  if (core != nullptr && timeout_ms <= 0) {
    log_error("%s: timeout_in_millis=%d must be positive", function, timeout_ms);
    *status = kParamInvalid;
    return nullptr;
  }
  return core;
}

uint32_t Engine::register_mem(uint64_t address, uint64_t length, ::hixl::MemType type,
                              uint64_t* handle) {
  *handle = 0;
  uint32_t status;
  const auto core = enter("register_mem", &status);
  return core == nullptr ? status : core->memory.register_range(address, length, type, handle);
}

uint32_t Engine::deregister_mem(uint64_t handle) {
  uint32_t status;
  const auto core = enter("deregister_mem", &status);
  return core == nullptr ? status
                         : core->memory.deregister(handle, [&core] { return core->connected(); });
}

uint32_t Engine::connect(const std::string& remote, int32_t timeout_ms) {
  uint32_t status;
  const auto core = enter_for("connect", timeout_ms, &status);
  return core == nullptr ? status : core->links.connect(remote, Deadline(timeout_ms));
}

uint32_t Engine::connect_async(const std::string& remote, int32_t timeout_ms) {
  uint32_t status;
  const auto core = enter_for("connect_async", timeout_ms, &status);
  return core == nullptr ? status : core->links.connect_async(remote, Deadline(timeout_ms));
}

uint32_t Engine::disconnect(const std::string& remote, int32_t timeout_ms) {
  uint32_t status;
  const auto core = enter_for("disconnect", timeout_ms, &status);
  return core == nullptr ? status : core->links.disconnect(remote, Deadline(timeout_ms));
}

uint32_t Engine::disconnect_async(const std::string& remote, int32_t timeout_ms) {
  uint32_t status;
  const auto core = enter_for("disconnect_async", timeout_ms, &status);
  return core == nullptr ? status : core->links.disconnect_async(remote, Deadline(timeout_ms));
}

uint32_t Engine::connect_state(const std::string& remote, Links::State* state) {
  *state = Links::State::NOT_CONNECT;
  uint32_t status;
  const auto core = enter("get_async_connect_status", &status);
  if (core != nullptr) {
    *state = core->links.state(remote);
  }
  return status;
}

uint32_t Engine::connect_states(std::map<std::string, Links::State>* states) {
  uint32_t status;
  const auto core = enter("get_all_async_connect_status", &status);
  if (core != nullptr) {
    *states = core->links.states();
  }
  return status;
}

uint32_t Engine::transfer_sync(const std::string& remote, bool write,
                               const std::vector<AscendSimPiece>& pieces, int32_t timeout_ms) {
  uint32_t status;
  const auto core = enter_for("transfer_sync", timeout_ms, &status);
  if (core == nullptr) {
    return status;
  }
  const Deadline deadline(timeout_ms);
  std::shared_ptr<Link> link;
  status = core->links.reach(remote, deadline, &link);
  if (status != kSuccess) {
    return status;
  }
  std::shared_ptr<Transfer> transfer;
  status = core->prepare(link, write, pieces, core->options.staging, 0, &transfer);
  if (status != kSuccess) {
    return status;
  }
  if (!transfer->finish(deadline)) {
    log_error("transfer_sync: %s: %d ms are over", remote.c_str(), timeout_ms);
    core->requests.abandon(transfer);
    return kTimeout;
  }
  return transfer->state() == TransferState::COMPLETED ? kSuccess : kFailed;
}

uint32_t Engine::transfer_async(const std::string& remote, bool write,
                                const std::vector<AscendSimPiece>& pieces, uint64_t user_data,
                                uint64_t* request) {
  *request = 0;
  uint32_t status;
  const auto core = enter("transfer_async", &status);
  if (core == nullptr) {
    return status;
  }
  std::shared_ptr<Link> link;
  status = core->links.reach(remote, Deadline(1000), &link);
  if (status != kSuccess) {
    return status;
  }
  std::shared_ptr<Transfer> transfer;
  status = core->prepare(link, write, pieces, false, user_data, &transfer);
  if (status != kSuccess) {
    return status;
  }
  *request = core->requests.submit(transfer);
  return *request == 0 ? kResourceExhausted : kSuccess;
}

uint32_t Engine::transfer_state(uint64_t request, TransferState* state) {
  *state = TransferState::FAILED;
  uint32_t status;
  const auto core = enter("get_transfer_status", &status);
  if (core == nullptr) {
    return status;
  }
  const std::optional<TransferState> found = core->requests.poll(request);
  if (!found.has_value()) {
    log_error("get_transfer_status: unknown request %llu", printed(request));
    return kParamInvalid;
  }
  *state = *found;
  return kSuccess;
}

uint32_t Engine::transfer_states(uint32_t max_count, bool skip_waiting,
                                 std::vector<TransferReport>* reports) {
  uint32_t status;
  const auto core = enter("get_all_transfer_status", &status);
  if (core == nullptr) {
    return status;
  }
  if (!core->options.client_server) {
    return kUnsupported;
  }
  *reports = core->requests.poll_all(max_count, skip_waiting);
  return kSuccess;
}

uint32_t Engine::send_notify(const std::string& remote, const Notify& notify, int32_t timeout_ms) {
  uint32_t status;
  const auto core = enter_for("send_notify", timeout_ms, &status);
  if (core == nullptr) {
    return status;
  }
  if (std::max(characters(notify.first), characters(notify.second)) > kMaxNotifyCharacters) {
    log_error("send_notify: more than %zu characters", kMaxNotifyCharacters);
    return kParamInvalid;
  }
  const std::shared_ptr<Link> link = core->links.find(remote);
  if (link == nullptr) {
    return kNotConnected;
  }
  try {
    return link->notify(notify.first, notify.second, Deadline(timeout_ms)) ? kSuccess
                                                                           : kNotifyFailed;
  } catch (const TimedOut&) {
    return kTimeout;
  } catch (const IoError& error) {
    log_error("send_notify: %s: %s", remote.c_str(), error.what());
    return kNotifyFailed;
  }
}

uint32_t Engine::get_notifies(std::vector<Notify>* notifies) {
  uint32_t status;
  const auto core = enter("get_notifies", &status);
  if (core != nullptr && core->server != nullptr) {
    *notifies = core->server->inbox().take();
  }
  return status;
}

}  // namespace ascend_sim::hixl
