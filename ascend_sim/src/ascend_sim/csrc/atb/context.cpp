// SPDX-License-Identifier: Apache-2.0
// What libatb.so's operations run in: a context that knows the stream.
#include "../sim_api.h"
#include "abi.h"

namespace atb __attribute__((visibility("default"))) {
  namespace {

  class SimulatedContext final : public Context {
   public:
    Status SetExecuteStream(aclrtStream stream) override {
      streams_ = {stream};
      return kNoError;
    }
    aclrtStream GetExecuteStream() const override {
      return streams_.empty() ? nullptr : streams_.front();
    }
    Status SetAsyncTilingCopyStatus(bool enable) override {
      copies_tiling_asynchronously_ = enable;
      return kNoError;
    }
    bool GetAsyncTilingCopyStatus() const override { return copies_tiling_asynchronously_; }
    Status SetExecuteStreams(const std::vector<aclrtStream>& streams) override {
      streams_ = streams;
      return kNoError;
    }
    std::vector<aclrtStream> GetExecuteStreams() override { return streams_; }
    Status SetExecuteType(int type) override {
      execute_type_ = type;
      return kNoError;
    }
    int GetExecuteType() override { return execute_type_; }
    Status SetLaunchMode(int mode) override {
      launch_mode_ = mode;
      return kNoError;
    }
    int GetLaunchMode() override { return launch_mode_; }

   private:
    std::vector<aclrtStream> streams_;
    bool copies_tiling_asynchronously_ = false;
    int execute_type_ = 0;
    int launch_mode_ = 0;
  };

  }  // namespace

  Status CreateContext(Context * *context) {
    if (context == nullptr) {
      ascend_sim_fail(kInvalidParameter, "atb::CreateContext: no place for the context");
      return kInvalidParameter;
    }
    *context = new SimulatedContext;
    return kNoError;
  }

  Status DestroyContext(Context * context) {
    delete context;
    return kNoError;
  }

  Status DestroyOperation(Operation * operation) {
    delete operation;
    return kNoError;
  }

  uint64_t Utils::GetTensorSize(const Tensor& tensor) {
    uint64_t nbytes = aclDataTypeSize(tensor.dtype);
    for (uint64_t i = 0; i < tensor.rank && i < 8; ++i) {
      nbytes *= static_cast<uint64_t>(tensor.dims[i]);
    }
    return tensor.rank == 0 ? 0 : nbytes;
  }

}  // namespace atb
