// SPDX-License-Identifier: Apache-2.0
// Fused attention, to which torch_npu sends scaled_dot_product_attention in half precision.

#include <ATen/ops/repeat_interleave.h>

#include "kernel.h"
#include "masks.h"

using namespace ascend_sim;  // NOLINT: the tables below are written in its words

namespace {

// What all versions of the function have in common.
struct Attention {
  Tensor query;
  Tensor key;
  Tensor value;
  Tensor bias;
  Tensor mask;
  double scale;
  Band band;
  int64_t heads;
  std::string layout;
  int64_t mask_mode;
};

// From the layout to [batch, head, token, element].
Tensor heads_first(const Tensor& tensor, const std::string& layout, int64_t heads) {
  if (layout == "BNSD") return tensor;
  if (layout == "BSND") return tensor.transpose(1, 2);
  const int64_t width = tensor.size(2) / heads;
  if (layout == "BSH") return tensor.unflatten(2, {heads, width}).transpose(1, 2);
  if (layout == "SBH") return tensor.unflatten(2, {heads, width}).permute({1, 2, 0, 3});
  TORCH_CHECK(false, "only the layouts BNSD, BSND, BSH and SBH, not ", layout);
}

Tensor from_heads_first(const Tensor& tensor, const std::string& layout) {
  if (layout == "BNSD") return tensor;
  if (layout == "BSND") return tensor.transpose(1, 2);
  if (layout == "BSH") return tensor.transpose(1, 2).flatten(2);
  return tensor.permute({2, 0, 1, 3}).flatten(2);
}

// How many heads the keys have: fewer than the queries when several share one.
int64_t key_heads(const Attention& attention) {
  const std::string& layout = attention.layout;
  if (layout == "BNSD") return attention.key.size(1);
  if (layout == "BSND") return attention.key.size(2);
  return attention.key.size(2) / (attention.query.size(2) / attention.heads);
}

void attend(const Attention& attention, double kept, const Out& maximum, const Out& sum,
            const Out& result) {
  TORCH_CHECK(kept == 1.0, "dropout in fused attention isn't simulated");
  const int64_t key_groups = key_heads(attention);
  const auto prepared = [&](const Tensor& tensor, int64_t heads) {
    return heads_first(tensor, attention.layout, heads).to(at::kFloat);
  };
  const Tensor query = prepared(attention.query, attention.heads);
  const int64_t shared = attention.heads / key_groups;
  const Tensor key = prepared(attention.key, key_groups).repeat_interleave(shared, 1);
  const Tensor value = prepared(attention.value, key_groups).repeat_interleave(shared, 1);
  Tensor scores = query.matmul(key.transpose(-1, -2)).mul(attention.scale);
  if (attention.bias.defined()) scores = scores.add(attention.bias);
  const Tensor mask =
      hidden_keys(attention.mask_mode, attention.mask, attention.band, query.size(2), key.size(2));
  if (mask.defined()) scores = scores.masked_fill(mask, -1e30);
  const Tensor highest = scores.amax({-1}, /*keepdim=*/true);
  const Tensor weights = scores.sub(highest).exp();
  const Tensor total = weights.sum({-1}, /*keepdim=*/true);
  // The backward pass reads these eight times side by side.
  if (maximum) maximum = highest.expand_as(maximum.get());
  if (sum) sum = total.expand_as(sum.get());
  result = from_heads_first(weights.div(total).matmul(value), attention.layout);
}

}  // namespace

ACLNN(FlashAttentionScore,
      [](Tensor query, Tensor key, Tensor value, Tensor bias, Tensor /*drop*/, Tensor /*padding*/,
         Tensor mask, Ints /*prefix*/, double scale, double kept, int64_t left, int64_t right,
         int64_t heads, std::string layout, int64_t /*precise*/, int64_t mode, Out maximum, Out sum,
         Out /*softmax*/, Out result) {
        attend({query, key, value, bias, mask, scale, {left, right}, heads, layout, mode}, kept,
               maximum, sum, result);
      })
ACLNN(FlashAttentionScoreV2,
      [](Tensor query, Tensor key, Tensor value, Tensor bias, Tensor /*drop*/, Tensor /*padding*/,
         Tensor mask, Ints /*prefix*/, Ints /*query_start*/, Ints /*key_start*/, double scale,
         double kept, int64_t left, int64_t right, int64_t heads, std::string layout,
         int64_t /*precise*/, int64_t mode, int64_t /*bias_type*/, Out maximum, Out sum,
         Out /*softmax*/, Out result) {
        attend({query, key, value, bias, mask, scale, {left, right}, heads, layout, mode}, kept,
               maximum, sum, result);
      })
