// SPDX-License-Identifier: Apache-2.0
// One engine: it reads and writes the registered memory of others, and they read and write its.
#pragma once

#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "links.h"
#include "memory.h"
#include "options.h"
#include "server.h"
#include "transfers.h"

namespace ascend_sim::hixl {

// Both faces stand on it: the class hixl::Hixl, and the Python module hixl. Statuses are HIXL's.
// Calls belong to the thread that initialised it, or to threads with the same AscendCL context.
class Engine {
 public:
  ~Engine() { finalize(); }

  uint32_t initialize(const std::string& name, const std::map<std::string, std::string>& options);
  void finalize();
  uint32_t register_mem(uint64_t address, uint64_t length, ::hixl::MemType type, uint64_t* handle);
  uint32_t deregister_mem(uint64_t handle);
  uint32_t connect(const std::string& remote, int32_t timeout_ms);
  uint32_t connect_async(const std::string& remote, int32_t timeout_ms);
  uint32_t disconnect(const std::string& remote, int32_t timeout_ms);
  uint32_t disconnect_async(const std::string& remote, int32_t timeout_ms);
  uint32_t connect_state(const std::string& remote, Links::State* state);
  uint32_t connect_states(std::map<std::string, Links::State>* states);
  uint32_t transfer_sync(const std::string& remote, bool write,
                         const std::vector<AscendSimPiece>& pieces, int32_t timeout_ms);
  uint32_t transfer_async(const std::string& remote, bool write,
                          const std::vector<AscendSimPiece>& pieces, uint64_t user_data,
                          uint64_t* request);
  uint32_t transfer_state(uint64_t request, TransferState* state);
  uint32_t transfer_states(uint32_t max_count, bool skip_waiting,
                           std::vector<TransferReport>* reports);
  uint32_t send_notify(const std::string& remote, const Notify& notify, int32_t timeout_ms);
  uint32_t get_notifies(std::vector<Notify>* notifies);

 private:
  struct Core;

  // The engine for a call, or NULL and the status of a call that is refused.
  std::shared_ptr<Core> enter(const char* function, uint32_t* status);
  std::shared_ptr<Core> enter_for(const char* function, int32_t timeout_ms, uint32_t* status);

  std::mutex mutex_;
  std::shared_ptr<Core> core_;
};

}  // namespace ascend_sim::hixl
