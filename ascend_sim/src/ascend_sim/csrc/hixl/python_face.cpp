// SPDX-License-Identifier: Apache-2.0
// What the simulated Python module hixl calls through ctypes. The engine is the one of the class.
#include <cstring>

#include "engine.h"

using ascend_sim::hixl::Engine;
using ascend_sim::hixl::Links;
using ascend_sim::hixl::Notify;
using ascend_sim::hixl::TransferReport;
using ascend_sim::hixl::TransferState;

namespace {

// Lists leave as text, which the caller gives room for: its size, and what fits.
size_t copy_out(const std::string& text, char* buffer, size_t size) {
  std::memcpy(buffer, text.data(), std::min(text.size(), size));
  return text.size();
}

void append_text(std::string* all, const std::string& text) {
  const uint64_t length = text.size();
  all->append(reinterpret_cast<const char*>(&length), sizeof length);
  *all += text;
}

// A list waits here between the call that made it and the one that takes it.
std::string& thread_list() {
  thread_local std::string list;
  return list;
}

}  // namespace

ASCEND_SIM_API Engine* ascend_sim_hixl_new() { return new Engine; }

// Options as pairs of texts, each ended by a zero byte.
ASCEND_SIM_API uint32_t ascend_sim_hixl_initialize(Engine* engine, const char* name,
                                                   const char* options, size_t count) {
  std::map<std::string, std::string> texts;
  for (; count > 0; --count) {
    const std::string key = options;
    options += key.size() + 1;
    texts[key] = options;
    options += texts[key].size() + 1;
  }
  return engine->initialize(name, texts);
}

ASCEND_SIM_API void ascend_sim_hixl_finalize(Engine* engine) { engine->finalize(); }

ASCEND_SIM_API uint32_t ascend_sim_hixl_register(Engine* engine, uint64_t address, uint64_t length,
                                                 uint32_t type, uint64_t* handle) {
  return engine->register_mem(address, length, static_cast<hixl::MemType>(type), handle);
}

ASCEND_SIM_API uint32_t ascend_sim_hixl_deregister(Engine* engine, uint64_t handle) {
  return engine->deregister_mem(handle);
}

ASCEND_SIM_API uint32_t ascend_sim_hixl_connect(Engine* engine, const char* remote, int32_t ms) {
  return engine->connect(remote, ms);
}

ASCEND_SIM_API uint32_t ascend_sim_hixl_connect_async(Engine* engine, const char* remote,
                                                      int32_t ms) {
  return engine->connect_async(remote, ms);
}

ASCEND_SIM_API uint32_t ascend_sim_hixl_disconnect(Engine* engine, const char* remote, int32_t ms) {
  return engine->disconnect(remote, ms);
}

ASCEND_SIM_API uint32_t ascend_sim_hixl_disconnect_async(Engine* engine, const char* remote,
                                                         int32_t ms) {
  return engine->disconnect_async(remote, ms);
}

ASCEND_SIM_API uint32_t ascend_sim_hixl_connect_state(Engine* engine, const char* remote,
                                                      uint32_t* state) {
  Links::State found;
  const uint32_t status = engine->connect_state(remote, &found);
  *state = static_cast<uint32_t>(found);
  return status;
}

// Makes a list: for each peer its state, as a character, and its name.
ASCEND_SIM_API uint32_t ascend_sim_hixl_connect_states(Engine* engine) {
  std::map<std::string, Links::State> states;
  const uint32_t status = engine->connect_states(&states);
  thread_list().clear();
  for (const auto& [remote, state] : states) {
    append_text(&thread_list(), static_cast<char>('0' + static_cast<int>(state)) + remote);
  }
  return status;
}

ASCEND_SIM_API uint32_t ascend_sim_hixl_transfer_sync(Engine* engine, const char* remote,
                                                      int32_t write, const AscendSimPiece* pieces,
                                                      size_t count, int32_t ms) {
  return engine->transfer_sync(remote, write != 0, {pieces, pieces + count}, ms);
}

ASCEND_SIM_API uint32_t ascend_sim_hixl_transfer_async(Engine* engine, const char* remote,
                                                       int32_t write, const AscendSimPiece* pieces,
                                                       size_t count, uint64_t user_data,
                                                       uint64_t* request) {
  return engine->transfer_async(remote, write != 0, {pieces, pieces + count}, user_data, request);
}

ASCEND_SIM_API uint32_t ascend_sim_hixl_transfer_state(Engine* engine, uint64_t request,
                                                       uint32_t* state) {
  TransferState found;
  const uint32_t status = engine->transfer_state(request, &found);
  *state = static_cast<uint32_t>(found);
  return status;
}

// Makes a list of `TransferReport`: three uint64 each.
ASCEND_SIM_API uint32_t ascend_sim_hixl_transfer_states(Engine* engine, uint32_t max_count,
                                                        int32_t skip_waiting) {
  std::vector<TransferReport> reports;
  const uint32_t status = engine->transfer_states(max_count, skip_waiting != 0, &reports);
  thread_list().clear();
  for (const TransferReport& report : reports) {
    const uint64_t numbers[] = {report.request, report.user_data,
                                static_cast<uint64_t>(report.state)};
    thread_list().append(reinterpret_cast<const char*>(numbers), sizeof numbers);
  }
  return status;
}

ASCEND_SIM_API uint32_t ascend_sim_hixl_send_notify(Engine* engine, const char* remote,
                                                    const char* name, const char* text,
                                                    int32_t ms) {
  return engine->send_notify(remote, {name, text}, ms);
}

// Makes a list: names and texts in turn.
ASCEND_SIM_API uint32_t ascend_sim_hixl_get_notifies(Engine* engine) {
  std::vector<Notify> taken;
  const uint32_t status = engine->get_notifies(&taken);
  thread_list().clear();
  for (const auto& [name, text] : taken) {
    append_text(&thread_list(), name);
    append_text(&thread_list(), text);
  }
  return status;
}

// The list that this thread's last call has made.
ASCEND_SIM_API size_t ascend_sim_hixl_list(char* buffer, size_t size) {
  return copy_out(thread_list(), buffer, size);
}

// What this thread's calls had to say since it was last asked: lines, each after 'E' or 'W'.
ASCEND_SIM_API size_t ascend_sim_hixl_log(char* buffer, size_t size) {
  return copy_out(ascend_sim::hixl::take_log(), buffer, size);
}

// Lets tests meet a limit: "links", "ranges" or "heartbeat_ms". Returns what it was.
ASCEND_SIM_API uint64_t ascend_sim_hixl_limit(const char* name, uint64_t value) {
  ascend_sim::hixl::Limits& all = ascend_sim::hixl::limits();
  const std::string wanted = name;
  std::atomic<uint64_t>& one = wanted == "links"    ? all.links
                               : wanted == "ranges" ? all.ranges
                                                    : all.heartbeat_ms;
  return one.exchange(value);
}
