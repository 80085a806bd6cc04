// SPDX-License-Identifier: Apache-2.0
// The class hixl::Hixl as CANN's libcann_hixl.so exports it: the same names, layouts and calling
// conventions, so that programs compiled against CANN's interface find them here.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#define HIXL_API __attribute__((visibility("default")))

namespace ge {

// Holds a string of the old C++ ABI, whatever ABI its users are compiled for: they may copy it and
// call its members, and nothing else.
class HIXL_API AscendString {
 public:
  AscendString();
  AscendString(const char* text);  // NOLINT: implicit in the original
  ~AscendString();
  AscendString(const AscendString&) = default;
  AscendString& operator=(const AscendString&) = default;

  const char* GetString() const;
  bool operator<(const AscendString& other) const;

 private:
  std::shared_ptr<std::string> text_;
};

}  // namespace ge

namespace hixl {

using Status = uint32_t;
using MemHandle = void*;
using TransferReq = void*;
using Text = ge::AscendString;

enum MemType : uint32_t { MEM_DEVICE, MEM_HOST };
enum TransferOp : uint32_t { READ, WRITE };
enum class TransferStatus : uint32_t { WAITING, COMPLETED, TIMEOUT, FAILED };
enum class AsyncConnectStatus : uint32_t {
  NOT_CONNECT,
  CONNECT_PENDING,
  CONNECTING,
  CONNECTED,
  CONNECT_FAILED,
  DISCONNECT_PENDING,
  DISCONNECTING
};
enum class FeatureType : uint32_t { AUTO_CONNECT, CLIENT_SERVER_COMM };

struct MemDesc {
  uintptr_t addr;
  size_t len;
  uint8_t reserved[128];
};
struct TransferOpDesc {
  uintptr_t local_addr;
  uintptr_t remote_addr;
  size_t len;
};
struct TransferArgs {
  const void* user_data;
  uint8_t reserved[120];
};
struct GetTransferStatusArgs {
  uint32_t max_query_count;
  bool skip_waiting;
  uint8_t reserved[123];
};
struct TransferResult {
  TransferReq req;
  const void* user_data;
  TransferStatus status;
  uint8_t reserved[108];
};
struct NotifyDesc {
  Text name;
  Text notify_msg;
};

class HIXL_API Hixl {
 public:
  Hixl();
  ~Hixl();
  Status Initialize(const Text& local_engine, const std::map<Text, Text>& options);
  void Finalize();
  Status RegisterMem(const MemDesc& mem, MemType type, MemHandle& handle);
  Status DeregisterMem(MemHandle handle);
  Status Connect(const Text& remote_engine, int32_t timeout_in_millis);
  Status Disconnect(const Text& remote_engine, int32_t timeout_in_millis);
  Status ConnectAsync(const Text& remote_engine, int32_t timeout_in_millis);
  Status DisconnectAsync(const Text& remote_engine, int32_t timeout_in_millis);
  Status GetAsyncConnectStatus(const Text& remote_engine, AsyncConnectStatus& status);
  Status GetAsyncConnectStatus(std::map<Text, AsyncConnectStatus>& statuses);
  Status TransferSync(const Text& remote_engine, TransferOp operation,
                      const std::vector<TransferOpDesc>& descs, int32_t timeout_in_millis);
  Status TransferAsync(const Text& remote_engine, TransferOp operation,
                       const std::vector<TransferOpDesc>& descs, const TransferArgs& args,
                       TransferReq& request);
  Status GetTransferStatus(const TransferReq& request, TransferStatus& status);
  Status GetTransferStatus(const GetTransferStatusArgs& args, std::vector<TransferResult>& results);
  Status SendNotify(const Text& remote_engine, const NotifyDesc& notify, int32_t timeout_in_millis);
  Status GetNotifies(std::vector<NotifyDesc>& notifies);
  static Status GetCapability(FeatureType feature, int32_t& value);

 private:
  class Implementation;
  std::unique_ptr<Implementation> implementation_;
};

}  // namespace hixl
