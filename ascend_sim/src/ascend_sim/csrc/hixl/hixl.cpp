// SPDX-License-Identifier: Apache-2.0
// The class hixl::Hixl, over the simulated engine.
#include "engine.h"
#include "public.h"

namespace sim = ascend_sim::hixl;

namespace hixl {

class Hixl::Implementation : public sim::Engine {};

namespace {

std::vector<AscendSimPiece> pieces_of(const std::vector<TransferOpDesc>& descs) {
  std::vector<AscendSimPiece> pieces;
  pieces.reserve(descs.size());
  for (const TransferOpDesc& desc : descs) {
    pieces.push_back({desc.local_addr, desc.remote_addr, desc.len});
  }
  return pieces;
}

}  // namespace

Hixl::Hixl() : implementation_(std::make_unique<Implementation>()) {}
Hixl::~Hixl() = default;

Status Hixl::Initialize(const Text& local_engine, const std::map<Text, Text>& options) {
  std::map<std::string, std::string> texts;
  for (const auto& [key, value] : options) {
    texts[key.GetString()] = value.GetString();
  }
  return implementation_->initialize(local_engine.GetString(), texts);
}

void Hixl::Finalize() { implementation_->finalize(); }

Status Hixl::RegisterMem(const MemDesc& mem, MemType type, MemHandle& handle) {
  uint64_t number = 0;
  const Status status = implementation_->register_mem(mem.addr, mem.len, type, &number);
  handle = reinterpret_cast<MemHandle>(number);
  return status;
}

Status Hixl::DeregisterMem(MemHandle handle) {
  return implementation_->deregister_mem(reinterpret_cast<uint64_t>(handle));
}

Status Hixl::Connect(const Text& remote_engine, int32_t timeout_in_millis) {
  return implementation_->connect(remote_engine.GetString(), timeout_in_millis);
}

Status Hixl::Disconnect(const Text& remote_engine, int32_t timeout_in_millis) {
  return implementation_->disconnect(remote_engine.GetString(), timeout_in_millis);
}

Status Hixl::ConnectAsync(const Text& remote_engine, int32_t timeout_in_millis) {
  return implementation_->connect_async(remote_engine.GetString(), timeout_in_millis);
}

Status Hixl::DisconnectAsync(const Text& remote_engine, int32_t timeout_in_millis) {
  return implementation_->disconnect_async(remote_engine.GetString(), timeout_in_millis);
}

Status Hixl::GetAsyncConnectStatus(const Text& remote_engine, AsyncConnectStatus& status) {
  return implementation_->connect_state(remote_engine.GetString(), &status);
}

Status Hixl::GetAsyncConnectStatus(std::map<Text, AsyncConnectStatus>& statuses) {
  std::map<std::string, AsyncConnectStatus> states;
  const Status status = implementation_->connect_states(&states);
  for (const auto& [remote, state] : states) {
    statuses.emplace(remote.c_str(), state);
  }
  return status;
}

Status Hixl::TransferSync(const Text& remote_engine, TransferOp operation,
                          const std::vector<TransferOpDesc>& descs, int32_t timeout_in_millis) {
  return implementation_->transfer_sync(remote_engine.GetString(), operation == WRITE,
                                        pieces_of(descs), timeout_in_millis);
}

Status Hixl::TransferAsync(const Text& remote_engine, TransferOp operation,
                           const std::vector<TransferOpDesc>& descs, const TransferArgs& args,
                           TransferReq& request) {
  uint64_t number = 0;
  const Status status = implementation_->transfer_async(
      remote_engine.GetString(), operation == WRITE, pieces_of(descs),
      reinterpret_cast<uint64_t>(args.user_data), &number);
  request = reinterpret_cast<TransferReq>(number);
  return status;
}

Status Hixl::GetTransferStatus(const TransferReq& request, TransferStatus& status) {
  return implementation_->transfer_state(reinterpret_cast<uint64_t>(request), &status);
}

Status Hixl::GetTransferStatus(const GetTransferStatusArgs& args,
                               std::vector<TransferResult>& results) {
  std::vector<sim::TransferReport> reports;
  const Status status =
      implementation_->transfer_states(args.max_query_count, args.skip_waiting, &reports);
  for (const sim::TransferReport& report : reports) {
    TransferResult result{};
    result.req = reinterpret_cast<TransferReq>(report.request);
    result.user_data = reinterpret_cast<const void*>(report.user_data);
    result.status = report.state;
    results.push_back(result);
  }
  return status;
}

Status Hixl::SendNotify(const Text& remote_engine, const NotifyDesc& notify,
                        int32_t timeout_in_millis) {
  return implementation_->send_notify(remote_engine.GetString(),
                                      {notify.name.GetString(), notify.notify_msg.GetString()},
                                      timeout_in_millis);
}

Status Hixl::GetNotifies(std::vector<NotifyDesc>& notifies) {
  std::vector<sim::Notify> taken;
  const Status status = implementation_->get_notifies(&taken);
  for (const auto& [name, text] : taken) {
    notifies.push_back({Text(name.c_str()), Text(text.c_str())});
  }
  return status;
}

Status Hixl::GetCapability(FeatureType feature, int32_t& value) {
  value = feature == FeatureType::AUTO_CONNECT || feature == FeatureType::CLIENT_SERVER_COMM;
  return sim::kSuccess;
}

}  // namespace hixl
