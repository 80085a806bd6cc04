// SPDX-License-Identifier: Apache-2.0
// Layers of neural networks.

#include <ATen/ops/_log_softmax.h>
#include <ATen/ops/_softmax.h>
#include <ATen/ops/elu.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/glu.h>
#include <ATen/ops/hardtanh.h>
#include <ATen/ops/leaky_relu.h>
#include <ATen/ops/mse_loss.h>
#include <ATen/ops/native_group_norm.h>
#include <ATen/ops/native_layer_norm.h>
#include <ATen/ops/nll_loss_forward.h>
#include <ATen/ops/silu.h>
#include <ATen/ops/softplus.h>
#include <ATen/ops/threshold.h>

#include "kernel.h"
#include "rotary.h"
#include "slots.h"

using namespace ascend_sim;  // NOLINT: the tables below are written in its words

namespace {

std::optional<Tensor> optional(const Tensor& tensor) {
  return tensor.defined() ? std::optional<Tensor>(tensor) : std::nullopt;
}

// x / sqrt(mean(x^2) + epsilon) * gamma + beta over the dimensions that gamma has, summed in float.
void rms_norm(const Tensor& x, const Tensor& gamma, double epsilon, const Out& y, const Out& rstd,
              const Tensor& beta = {}) {
  Ints dims;
  for (int64_t dim = x.dim() - gamma.dim(); dim < x.dim(); ++dim) dims.push_back(dim);
  const Tensor wide = x.to(at::kFloat);
  const Tensor scale = wide.square().mean(dims, /*keepdim=*/true).add(epsilon).rsqrt();
  if (rstd) rstd = scale.reshape(rstd.get().sizes());
  const Tensor scaled = wide.mul(scale).mul(gamma.to(at::kFloat));
  y = beta.defined() ? scaled.add(beta.to(at::kFloat)) : scaled;
}

void add_rms_norm(const Tensor& x1, const Tensor& x2, const Tensor& gamma, const Tensor& beta,
                  double epsilon, const Out& y, const Out& rstd, const Out& sum) {
  const Tensor x = x1.add(x2);
  rms_norm(x, gamma, epsilon, y, rstd, beta);
  sum = x;
}

// The last dimension's neighbours taken apart: first all that have an even place, then the others.
Tensor taken_apart(const Tensor& x) {
  return x.unflatten(-1, {-1, 2}).transpose(-1, -2).flatten(-2);
}

}  // namespace

ACLNN(Softmax, [](Tensor self, int64_t dim, Out out) {
  out = at::_softmax(self.to(out.dtype()), dim, /*half_to_float=*/false);
})
ACLNN(LogSoftmax, [](Tensor self, int64_t dim, Out out) {
  out = at::_log_softmax(self.to(out.dtype()), dim, /*half_to_float=*/false);
})
ACLNN(LayerNorm, [](Tensor input, Ints shape, Tensor weight, Tensor bias, double epsilon, Out out,
                    Out mean, Out rstd) {
  const auto results =
      at::native_layer_norm(input, shape, optional(weight), optional(bias), epsilon);
  out = std::get<0>(results);
  if (mean) mean = std::get<1>(results).reshape(mean.get().sizes());
  if (rstd) rstd = std::get<2>(results).reshape(rstd.get().sizes());
})
ACLNN(RmsNorm, [](Tensor x, Tensor gamma, double epsilon, Out y, Out rstd) {
  rms_norm(x, gamma, epsilon, y, rstd);
})
ACLNN(AddRmsNorm, [](Tensor x1, Tensor x2, Tensor gamma, double epsilon, Out y, Out rstd, Out sum) {
  add_rms_norm(x1, x2, gamma, {}, epsilon, y, rstd, sum);
})
ACLNN(AddRmsNormBias,
      [](Tensor x1, Tensor x2, Tensor gamma, Tensor beta, double epsilon, Out y, Out rstd,
         Out sum) { add_rms_norm(x1, x2, gamma, beta, epsilon, y, rstd, sum); })
ACLNN(InplaceAddRmsNorm, [](Out x1, Out x2, Tensor gamma, double epsilon, Out rstd) {
  add_rms_norm(x1, x2.get(), gamma, {}, epsilon, x1, rstd, x2);
})
ACLNN(GemmaRmsNorm, [](Tensor x, Tensor gamma, double epsilon, Out y, Out rstd) {
  rms_norm(x, gamma.to(at::kFloat).add(1), epsilon, y, rstd);
})
ACLNN(RotaryPositionEmbedding, [](Tensor x, Tensor cos, Tensor sin, int64_t mode, Out out) {
  out = turned(x, cos, sin, mode);
})
ACLNN(ApplyRotaryPosEmbV2,
      [](Out query, Out key, Tensor cos, Tensor sin, int64_t /*layout*/, std::string mode) {
        TORCH_CHECK(mode == "half" || mode == "interleave",
                    "only the rotary modes half and interleave, not ", mode);
        for (const Out* each : {&query, &key}) {
          const Tensor x = each->get();
          *each = turned(x, cos, sin, mode == "half" ? 0 : 1);
        }
      })
ACLNN(InterleaveRope,
      [](Tensor x, Tensor cos, Tensor sin, Out out) { out = turned(taken_apart(x), cos, sin, 0); })
// Latent keys and values (MLA): the first part of kv is normalised, the rest turned, and both go to
// their caches.
ACLNN(KvRmsNormRopeCache,
      [](Tensor kv, Tensor gamma, Tensor cos, Tensor sin, Tensor index, Out rope_cache,
         Out latent_cache, Absent<"k_rope_scale">, Absent<"c_kv_scale">, Absent<"k_rope_offset">,
         Absent<"c_kv_offset">, double epsilon, std::string mode, bool wants_parts, Out rope_out,
         Out latent_out) {
        TORCH_CHECK(mode == "PA", "only the cache mode PA, not ", mode);
        const int64_t latent = gamma.size(0);
        const int64_t rope = kv.size(-1) - latent;
        const Tensor norm = at::empty_like(kv.narrow(-1, 0, latent));
        rms_norm(kv.narrow(-1, 0, latent), gamma, epsilon, Out(norm), Out(Tensor()));
        const Tensor angled = turned(taken_apart(kv.narrow(-1, latent, rope)), cos, sin, 0);
        write_slots(norm.reshape({-1, latent}), latent_cache.get(), index.flatten());
        write_slots(angled.reshape({-1, rope}), rope_cache.get(), index.flatten());
        if (!wants_parts) return;
        rope_out = angled;
        latent_out = norm;
      })
ACLNN(ScatterPaKvCache,
      [](Tensor key, Out key_cache, Tensor slots, Tensor value, Out value_cache,
         Absent<"compress_lens">, Absent<"compress_seq_offsets">, Absent<"seq_lens">,
         std::string mode, std::string scatter_mode, Ints /*strides*/, Ints /*offsets*/) {
        TORCH_CHECK(mode == "Norm" && scatter_mode == "None", "only the cache mode Norm, not ",
                    mode, " (scatter mode ", scatter_mode, ")");
        write_slots(key, key_cache.get(), slots);
        write_slots(value, value_cache.get(), slots);
      })
ACLNN(SwiGlu, [](Tensor self, int64_t dim, Out out) {
  const auto halves = self.chunk(2, dim);
  out = at::silu(halves[0]).mul(halves[1]);
})
ACLNN(Glu, [](Tensor self, int64_t dim, Out out) { out = at::glu(self, dim); })
ACLNN(Elu, [](Tensor self, Scalar alpha, Scalar scale, Scalar input_scale, Out out) {
  out = at::elu(self, alpha, scale, input_scale);
})
ACLNN(Hardtanh,
      [](Tensor self, Scalar min, Scalar max, Out out) { out = at::hardtanh(self, min, max); })
ACLNN(LeakyRelu, [](Tensor self, Scalar slope, Out out) { out = at::leaky_relu(self, slope); })
ACLNN(Softplus, [](Tensor self, Scalar beta, Scalar threshold, Out out) {
  out = at::softplus(self, beta, threshold);
})
ACLNN(Threshold, [](Tensor self, Scalar threshold, Scalar value, Out out) {
  out = at::threshold(self, threshold, value);
})
ACLNN(GroupNorm, [](Tensor input, Tensor weight, Tensor bias, int64_t n, int64_t channels,
                    int64_t area, int64_t groups, double epsilon, Out out, Out mean, Out rstd) {
  const auto results = at::native_group_norm(input.contiguous(), optional(weight), optional(bias),
                                             n, channels, area, groups, epsilon);
  out = std::get<0>(results);
  if (mean) mean = std::get<1>(results);
  if (rstd) rstd = std::get<2>(results);
})
ACLNN(MseLoss, [](Tensor self, Tensor target, int64_t reduction, Out out) {
  out = at::mse_loss(self, target, reduction);
})
ACLNN(NLLLoss, [](Tensor self, Tensor target, Tensor weight, int64_t reduction, int64_t ignored,
                  Out out, Out total_weight) {
  const auto results =
      at::nll_loss_forward(self, target.to(at::kLong), optional(weight), reduction, ignored);
  out = std::get<0>(results).reshape(out.get().sizes());
  total_weight = std::get<1>(results).reshape(total_weight.get().sizes());
})
