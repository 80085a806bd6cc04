// SPDX-License-Identifier: Apache-2.0
// CANN's transfer engine, the class hixl::Hixl of libcann_hixl.so, without CANN: its members are
// looked up by their mangled names, and what goes in and out is declared here in our own words.
//
// A member function is called as a function whose first argument is the object, which is what the
// C++ ABI of Linux makes of it (Itanium C++ ABI, x86-64 and aarch64).
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <string>
#include <vector>

namespace llmdd::hixl {

using Status = uint32_t;

class Library;

// Stands for ge::AscendString. It holds a string of the old C++ ABI, so it is made and read by
// CANN's own functions only, and never copied by us.
class Text {
 public:
  explicit Text(const char* text);
  ~Text();
  Text(const Text&) = delete;
  Text& operator=(const Text&) = delete;
  bool operator<(const Text& other) const;

 private:
  alignas(void*) unsigned char bytes_[2 * sizeof(void*)];  // one shared pointer
};

using Options = std::map<Text, Text>;

struct MemoryRange {
  uintptr_t address;
  size_t nbytes;
  uint8_t reserved[128];
};
struct Descriptor {
  uintptr_t local;
  uintptr_t remote;
  size_t nbytes;
};
struct TransferArguments {
  uint8_t reserved[128];
};
using Descriptors = std::vector<Descriptor>;

// The members that are used; those of CANN 9.1 and later are NULL before it.
struct Members {
  void (*text_construct)(void* self, const char* text);
  void (*text_destroy)(void* self);
  bool (*text_less)(const void* self, const void* other);
  void (*construct)(void* self);
  void (*destroy)(void* self);
  Status (*initialize)(void* self, const Text& engine, const Options& options);
  void (*finalize)(void* self);
  Status (*register_memory)(void* self, const MemoryRange& range, uint32_t kind, void*& handle);
  Status (*deregister_memory)(void* self, void* handle);
  Status (*connect)(void* self, const Text& remote, int32_t timeout_ms);
  Status (*disconnect)(void* self, const Text& remote, int32_t timeout_ms);
  Status (*transfer)(void* self, const Text& remote, uint32_t operation,
                     const Descriptors& descriptors, const TransferArguments& arguments,
                     void*& request);
  Status (*transfer_state)(void* self, void* const& request, uint32_t& state);
  Status (*capability)(uint32_t feature, int32_t& value);
};

// Loads the library, once per process. Returns NULL, or why it can't be used.
const char* load(const char* name);
// Its members; only after `load` has returned NULL.
const Members& members();
// The file that was loaded.
const char* path();

}  // namespace llmdd::hixl
