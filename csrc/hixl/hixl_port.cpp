// SPDX-License-Identifier: Apache-2.0
// What Python calls through ctypes (transports/hixl/native.py), with the GIL released: engines, and
// transfers whose descriptors are made here from tables of runs.
#include <algorithm>
#include <tuple>
#include <utility>

#include "hixl_library.h"

#define PORT_API extern "C" __attribute__((visibility("default")))

namespace {

using llmdd::hixl::Descriptors;
using llmdd::hixl::members;
using llmdd::hixl::MemoryRange;
using llmdd::hixl::Options;
using llmdd::hixl::Status;
using llmdd::hixl::Text;

constexpr int32_t kSupported = 1;

// hixl::Hixl: one pointer of state.
struct Engine {
  Engine() { members().construct(&state); }
  ~Engine() { members().destroy(&state); }
  void* state = nullptr;
};

}  // namespace

PORT_API const char* llmdd_hixl_load(const char* name) { return llmdd::hixl::load(name); }

PORT_API const char* llmdd_hixl_path() { return llmdd::hixl::path(); }

// Whether the release has a feature, which releases before CANN 9.1 can't be asked for.
PORT_API int32_t llmdd_hixl_supports(uint32_t feature) {
  int32_t value = 0;
  return members().capability != nullptr && members().capability(feature, value) == 0 &&
         value == kSupported;
}

// Whether it has the calls that CANN 9.1 brought.
PORT_API int32_t llmdd_hixl_can_be_asked() { return members().capability != nullptr; }

PORT_API Engine* llmdd_hixl_new() { return new Engine; }

PORT_API void llmdd_hixl_delete(Engine* engine) { delete engine; }

// `options`: `count` pairs of texts, keys and values in turn.
PORT_API Status llmdd_hixl_initialize(Engine* engine, const char* name, const char* const* options,
                                      size_t count) {
  Options given;
  for (size_t i = 0; i < count; ++i) {
    given.emplace(std::piecewise_construct, std::forward_as_tuple(options[2 * i]),
                  std::forward_as_tuple(options[2 * i + 1]));
  }
  return members().initialize(&engine->state, Text(name), given);
}

PORT_API void llmdd_hixl_finalize(Engine* engine) { members().finalize(&engine->state); }

PORT_API Status llmdd_hixl_register(Engine* engine, uint64_t address, uint64_t nbytes,
                                    uint32_t kind, void** handle) {
  const MemoryRange range{static_cast<uintptr_t>(address), static_cast<size_t>(nbytes), {}};
  return members().register_memory(&engine->state, range, kind, *handle);
}

PORT_API Status llmdd_hixl_deregister(Engine* engine, void* handle) {
  return members().deregister_memory(&engine->state, handle);
}

PORT_API Status llmdd_hixl_connect(Engine* engine, const char* remote, int32_t timeout_ms) {
  return members().connect(&engine->state, Text(remote), timeout_ms);
}

PORT_API Status llmdd_hixl_disconnect(Engine* engine, const char* remote, int32_t timeout_ms) {
  return members().disconnect(&engine->state, Text(remote), timeout_ms);
}

// Begins to move some of the runs of some pairs of tensors: those from number `first` on, `count`
// of them, where run r of pair t has number t * num_runs + r. A run is three int64: the offsets in
// the local and in the remote tensor, and bytes.
PORT_API Status llmdd_hixl_transfer(Engine* engine, const char* remote, uint32_t operation,
                                    const int64_t* local_addresses, const int64_t* remote_addresses,
                                    const int64_t* runs, size_t num_runs, size_t first,
                                    size_t count, void** request) {
  Descriptors descriptors;
  descriptors.reserve(count);
  for (size_t number = first; number < first + count; ++number) {
    const size_t pair = number / num_runs;
    const int64_t* run = runs + 3 * (number % num_runs);
    descriptors.push_back({static_cast<uintptr_t>(local_addresses[pair] + run[0]),
                           static_cast<uintptr_t>(remote_addresses[pair] + run[1]),
                           static_cast<size_t>(run[2])});
  }
  return members().transfer(&engine->state, Text(remote), operation, descriptors, {}, *request);
}

PORT_API Status llmdd_hixl_transfer_state(Engine* engine, void* request, uint32_t* state) {
  return members().transfer_state(&engine->state, request, *state);
}
