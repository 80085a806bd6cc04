// SPDX-License-Identifier: Apache-2.0
// The classes of libatb.so as torch_npu's libop_plugin_atb.so uses them: sizes, offsets and the
// order of virtual functions are what that library's code shows. There are no headers of it in
// torch_npu's wheel.
#pragma once

#include <acl/acl_rt.h>

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace atb __attribute__((visibility("default"))) {

  using Status = int32_t;
  enum : Status { kNoError = 0, kInvalidParameter = 1, kOutOfTensors = 7 };

  struct Tensor {
    aclDataType dtype;
    aclFormat format;
    int64_t dims[8];
    uint64_t rank;
    void* device;
    void* host;  // of a tensor that is on the host
    uint64_t nbytes;
  };

  // A vector whose first 64 elements lie in it; `heap` replaces them when there are more.
  template <typename T>
  struct SVector {
    size_t capacity;
    size_t size;
    T inside[65];
    T* heap;
    const T& operator[](size_t i) const { return heap == nullptr ? inside[i] : heap[i]; }
  };

  struct VariantPack {
    SVector<Tensor> inputs;
    SVector<Tensor> outputs;
  };

  static_assert(sizeof(Tensor) == 0x68 && sizeof(VariantPack) == 2 * 0x1a80);

  class Context {
   public:
    virtual ~Context() = default;
    virtual Status SetExecuteStream(aclrtStream stream) = 0;
    virtual aclrtStream GetExecuteStream() const = 0;
    virtual Status SetAsyncTilingCopyStatus(bool enable) = 0;
    virtual bool GetAsyncTilingCopyStatus() const = 0;
    virtual Status SetExecuteStreams(const std::vector<aclrtStream>& streams) = 0;
    virtual std::vector<aclrtStream> GetExecuteStreams() = 0;
    virtual Status SetExecuteType(int type) = 0;
    virtual int GetExecuteType() = 0;
    virtual Status SetLaunchMode(int mode) = 0;
    virtual int GetLaunchMode() = 0;
  };

  class Operation {
   public:
    virtual ~Operation() = default;
    virtual std::string GetName() const = 0;
    virtual Status InferShape(const void* inputs, void* outputs) const = 0;
    virtual uint32_t GetInputNum() const = 0;
    virtual uint32_t GetOutputNum() const = 0;
    virtual Status Setup(const VariantPack& pack, uint64_t& workspace_size, Context* context) = 0;
    virtual Status Execute(const VariantPack& pack, uint8_t* workspace, uint64_t workspace_size,
                           Context* context) = 0;
  };

  namespace infer {

  struct RopeParam {
    int32_t coefficient;  // 2: the two halves of a head turn; the size of a head: neighbours do
    int32_t cos_format;
  };

  struct ReshapeAndCacheParam {
    int32_t compress_type;
    int32_t cache_kind;  // 0: keys and values, 1: keys alone, 2: both in a private format
  };

  struct LinearParam {
    bool transpose_a;
    bool transpose_b;
    bool has_bias;
    int32_t out_type;  // -1: that of the inputs
    bool adds_to_output;
  };

  // Only that they are distinct types matters: their operations aren't simulated.
  struct ElewiseParam;
  struct GroupTopkParam;
  struct PagedAttentionParam;
  struct RmsNormParam;
  struct SelfAttentionParam;

  }  // namespace infer

  struct Utils {
    static uint64_t GetTensorSize(const Tensor& tensor);
  };

  Status CreateContext(Context * *context);
  Status DestroyContext(Context * context);
  Status DestroyOperation(Operation * operation);

  // Makes an operation. Returns an error for kinds that aren't simulated, and names them.
  template <typename Parameters>
  Status CreateOperation(const Parameters& parameters, Operation** operation);

}  // namespace atb
