// SPDX-License-Identifier: Apache-2.0
// The operations of libatb.so that are computed. They run as those of libopapi do: as tasks of a
// stream, by libtorch's CPU kernels.
#include <functional>

#include "../kernels/kernel.h"
#include "../kernels/rotary.h"
#include "../kernels/slots.h"
#include "../sim_api.h"
#include "abi.h"

namespace atb __attribute__((visibility("default"))) {
  namespace {

  using ascend_sim::Tensors;
  using ascend_sim::write_slots;

  // What an operation does with its tensors, when the stream gets there.
  using Body = std::function<void(const Tensors& inputs, const Tensors& outputs)>;

  aclTensor described(const Tensor& tensor) {
    const auto rank = static_cast<size_t>(tensor.rank);
    TORCH_CHECK(rank <= 8, rank, " dimensions, at most 8 are possible");
    TORCH_CHECK(tensor.format == ACL_FORMAT_ND || tensor.format == ACL_FORMAT_NCHW,
                "the simulator has no private formats (", static_cast<int>(tensor.format), ")");
    aclTensor result;
    result.shape = std::make_shared<std::vector<int64_t>>(tensor.dims, tensor.dims + rank);
    result.strides.resize(rank);
    int64_t elements = 1;
    for (size_t i = rank; i-- > 0;) {
      result.strides[i] = elements;
      elements *= tensor.dims[i];
    }
    result.offset = 0;
    result.dtype = ascend_sim::scalar_type(tensor.dtype);
    result.storage = tensor.device != nullptr ? tensor.device : tensor.host;
    return result;
  }

  // A launch that is prepared. Operations are made once and used often, so it keeps what it needs.
  class AtbLaunch final : public aclOpExecutor {
   public:
    AtbLaunch(const char* name, Body body, const VariantPack& pack)
        : aclOpExecutor(name, /*resizes_result=*/false),
          body_(std::move(body)),
          inputs_(kept(pack.inputs)),
          outputs_(kept(pack.outputs)) {}

    void run() const override { body_(viewed(inputs_), viewed(outputs_)); }

   private:
    static std::vector<aclTensor> kept(const SVector<Tensor>& tensors) {
      std::vector<aclTensor> result;
      for (size_t i = 0; i < tensors.size; ++i) result.push_back(described(tensors[i]));
      return result;
    }
    static Tensors viewed(const std::vector<aclTensor>& tensors) {
      Tensors result;
      for (const aclTensor& tensor : tensors) result.push_back(ascend_sim::view_of(tensor));
      return result;
    }

    Body body_;
    std::vector<aclTensor> inputs_;
    std::vector<aclTensor> outputs_;
  };

  class SimulatedOperation final : public Operation {
   public:
    SimulatedOperation(const char* name, uint32_t inputs, uint32_t outputs, Body body)
        : name_(name), inputs_(inputs), outputs_(outputs), body_(std::move(body)) {}

    std::string GetName() const override { return name_; }
    Status InferShape(const void* /*inputs*/, void* /*outputs*/) const override {
      ascend_sim_fail(kInvalidParameter, "%s: InferShape isn't simulated", name_);
      return kInvalidParameter;
    }
    uint32_t GetInputNum() const override { return inputs_; }
    uint32_t GetOutputNum() const override { return outputs_; }

    Status Setup(const VariantPack& pack, uint64_t& workspace_size, Context* /*context*/) override {
      workspace_size = 0;
      if (pack.inputs.size == inputs_ && pack.outputs.size == outputs_) return kNoError;
      ascend_sim_fail(kOutOfTensors, "%s: %zu inputs and %zu outputs, not %u and %u", name_,
                      pack.inputs.size, pack.outputs.size, inputs_, outputs_);
      return kOutOfTensors;
    }

    Status Execute(const VariantPack& pack, uint8_t* /*workspace*/, uint64_t /*workspace_size*/,
                   Context* context) override {
      try {
        auto* launch = new AtbLaunch(name_, body_, pack);
        return ascend_sim::launch(name_, launch, context->GetExecuteStream());
      } catch (...) {
        return ascend_sim::preparation_failed(name_);
      }
    }

   private:
    const char* name_;
    uint32_t inputs_;
    uint32_t outputs_;
    Body body_;
  };

  // The queries or keys of [token, head * element] turned by the angles of [token, element].
  at::Tensor with_positions(const at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin,
                            bool halves) {
    const int64_t width = cos.size(-1);
    TORCH_CHECK(x.dim() >= 2 && x.size(-1) % width == 0, "rows of shape ", x.sizes(),
                " don't consist of heads of ", width, " elements");
    const at::Tensor heads = x.to(at::kFloat).reshape({x.size(0), -1, width});
    const auto angles = [](const at::Tensor& of) { return of.to(at::kFloat).unsqueeze(1); };
    return ascend_sim::turned(heads, angles(cos), angles(sin), halves ? 0 : 1).reshape(x.sizes());
  }

  // Inputs: queries, keys, cos, sin, tokens per request; outputs: queries and keys.
  Body rope(const infer::RopeParam& parameters) {
    TORCH_CHECK(parameters.cos_format == 0, "cosines of format ", parameters.cos_format);
    return [coefficient = parameters.coefficient](const Tensors& in, const Tensors& out) {
      const int64_t width = in[2].size(-1);
      TORCH_CHECK(coefficient == 2 || coefficient == width, "only the rotary coefficients 2 and ",
                  width, " (the size of a head), not ", coefficient);
      for (size_t i = 0; i < 2; ++i) {
        out[i].copy_(with_positions(in[i], in[2], in[3], coefficient == 2));
      }
    };
  }

  // Inputs: keys, values, their caches, slots; or keys, cache, slots. Outputs: the caches again.
  Body reshape_and_cache(const infer::ReshapeAndCacheParam& parameters) {
    TORCH_CHECK(parameters.compress_type == 0, "compression ", parameters.compress_type);
    const bool has_values = parameters.cache_kind == 0;
    TORCH_CHECK(has_values || parameters.cache_kind == 1, "a cache of kind ", parameters.cache_kind,
                " (2 is the private format NZ)");
    return [has_values](const Tensors& in, const Tensors& out) {
      write_slots(in[0], out[0], in.back());
      if (has_values) write_slots(in[1], out[1], in.back());
    };
  }

  // Output: it plus the product of the first two inputs; the third input is the output.
  Body linear(const infer::LinearParam& parameters) {
    TORCH_CHECK(!parameters.has_bias && parameters.adds_to_output && parameters.out_type == -1,
                "only a product that is added to the output, without bias and quantisation");
    return [parameters](const Tensors& in, const Tensors& out) {
      const auto factor = [](const at::Tensor& x, bool transpose) {
        const at::Tensor wide = x.to(at::kFloat);
        return transpose ? wide.transpose(-1, -2) : wide;
      };
      const at::Tensor product =
          factor(in[0], parameters.transpose_a).matmul(factor(in[1], parameters.transpose_b));
      out[0].copy_(in[2].to(at::kFloat).add(product));
    };
  }

  // An exception says why the parameters can't be used.
  Status make(const char* name, Operation** operation, const std::function<Operation*()>& maker) {
    try {
      TORCH_CHECK(operation != nullptr, "no place for the operation");
      *operation = maker();
      return kNoError;
    } catch (...) {
      ascend_sim::preparation_failed(name);
      return kInvalidParameter;
    }
  }

  Status refuse(const char* name) {
    ascend_sim_fail(kInvalidParameter, "%s: the simulator has no kernel for this ATB operation",
                    name);
    return kInvalidParameter;
  }

  }  // namespace

  template <>
  Status CreateOperation(const infer::RopeParam& parameters, Operation** operation) {
    return make("RopeOperation", operation,
                [&] { return new SimulatedOperation("RopeOperation", 5, 2, rope(parameters)); });
  }

  template <>
  Status CreateOperation(const infer::ReshapeAndCacheParam& parameters, Operation** operation) {
    return make("ReshapeAndCacheOperation", operation, [&] {
      const bool has_values = parameters.cache_kind == 0;
      return new SimulatedOperation("ReshapeAndCacheOperation", has_values ? 5 : 3,
                                    has_values ? 2 : 1, reshape_and_cache(parameters));
    });
  }

  template <>
  Status CreateOperation(const infer::LinearParam& parameters, Operation** operation) {
    return make("LinearOperation", operation, [&] {
      return new SimulatedOperation("LinearOperation", 3, 1, linear(parameters));
    });
  }

  template <>
  Status CreateOperation(const infer::ElewiseParam& /*parameters*/, Operation** /*operation*/) {
    return refuse("ElewiseOperation");
  }

  template <>
  Status CreateOperation(const infer::GroupTopkParam& /*parameters*/, Operation** /*operation*/) {
    return refuse("GroupTopkOperation");
  }

  template <>
  Status CreateOperation(const infer::PagedAttentionParam& /*parameters*/,
                         Operation** /*operation*/) {
    return refuse("PagedAttentionOperation");
  }

  template <>
  Status CreateOperation(const infer::RmsNormParam& /*parameters*/, Operation** /*operation*/) {
    return refuse("RmsNormOperation");
  }

  template <>
  Status CreateOperation(const infer::SelfAttentionParam& /*parameters*/,
                         Operation** /*operation*/) {
    return refuse("SelfAttentionOperation");
  }

}  // namespace atb
