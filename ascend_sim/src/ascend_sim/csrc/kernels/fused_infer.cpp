// SPDX-License-Identifier: Apache-2.0
// Fused attention for inference: requests of different lengths, keys and values in the blocks of a
// cache, latent attention (MLA) whose rotary part comes apart.

#include <ATen/ops/cat.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/repeat_interleave.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/zeros.h>

#include <limits>

#include "kernel.h"
#include "masks.h"

using namespace ascend_sim;  // NOLINT: the tables below are written in its words

namespace {

// What all versions of the function have in common.
struct FusedInfer {
  Tensor query;
  Tensor key;
  Tensor value;
  Tensor mask;
  Tensor block_table;  // [request, block of it], of numbers of the cache's blocks
  Tensor query_rope;
  Tensor key_rope;
  Tensor sinks;  // one score per head, of a key that has no value
  Ints query_lengths;
  Ints key_lengths;
  int64_t heads;
  int64_t key_heads;
  double scale;
  Band band;
  std::string layout;
  int64_t mode;
  int64_t block_size;
};

// One request: where its tokens start in a packed tensor (0 where each has a row of its own).
struct Request {
  int64_t number;
  int64_t first_query;
  int64_t queries;
  int64_t first_key;
  int64_t keys;
};

// "BNSD_NBSD": the queries, keys and values come in the first layout, the result goes out in the
// second; a name alone is both.
std::string layout_in(const std::string& layout) { return layout.substr(0, layout.find('_')); }
std::string layout_out(const std::string& layout) {
  const size_t at = layout.find('_');
  return at == std::string::npos ? layout : layout.substr(at + 1);
}

// The tokens of a request of a tensor in a layout, as [head, token, element].
Tensor tokens_of(const Tensor& tensor, const std::string& layout, int64_t heads, int64_t request,
                 int64_t first, int64_t count) {
  if (layout == "TND") return tensor.narrow(0, first, count).transpose(0, 1);
  if (layout == "NTD") return tensor.narrow(1, first, count);
  if (layout == "NBSD") return tensor.select(1, request).narrow(1, 0, count);
  const Tensor own = tensor.select(0, request);
  if (layout == "BNSD") return own.narrow(1, 0, count);
  if (layout == "BSND") return own.narrow(0, 0, count).transpose(0, 1);
  if (layout == "BSH") return own.narrow(0, 0, count).unflatten(1, {heads, -1}).transpose(0, 1);
  TORCH_CHECK(false, "the layout ", layout,
              " isn't simulated, only TND, NTD, BNSD, BSND, BSH and NBSD");
}

bool is_packed(const FusedInfer& call) {
  const std::string layout = layout_in(call.layout);
  return layout == "TND" || layout == "NTD";
}

int64_t tokens_per_row(const Tensor& tensor, const std::string& layout) {
  return tensor.size(layout == "BNSD" ? 2 : 1);
}

// How many tokens a request has: `lengths` has one for all, one each, or none (`otherwise`).
int64_t length_of(const Ints& lengths, int64_t request, int64_t otherwise) {
  if (lengths.empty()) return otherwise;
  const auto at = lengths.size() == 1 ? 0 : static_cast<size_t>(request);
  TORCH_CHECK(at < lengths.size(), lengths.size(), " lengths for request ", request);
  TORCH_CHECK(lengths[at] >= 0 && lengths[at] <= otherwise, "request ", request, " has ",
              lengths[at], " tokens, at most ", otherwise, " are possible");
  return lengths[at];
}

// Start and number of the tokens of a request, by the sums of lengths up to each.
std::pair<int64_t, int64_t> packed_range(const Ints& sums, size_t request, int64_t tokens) {
  const int64_t first = request == 0 ? 0 : sums[request - 1];
  TORCH_CHECK(first >= 0 && first <= sums[request] && sums[request] <= tokens, "lengths ", sums,
              ": they are cumulative, and at most ", tokens);
  return {first, sums[request] - first};
}

int64_t paged_limit(const FusedInfer& call) { return call.block_table.size(1) * call.block_size; }

Request packed_request(const FusedInfer& call, size_t number) {
  const auto at = static_cast<int64_t>(number);
  const int64_t dim = layout_in(call.layout) == "TND" ? 0 : 1;
  const auto [first, count] = packed_range(call.query_lengths, number, call.query.size(dim));
  if (call.block_table.defined()) {
    return {at, first, count, 0, length_of(call.key_lengths, at, paged_limit(call))};
  }
  TORCH_CHECK(call.key_lengths.size() == call.query_lengths.size(), call.query_lengths.size(),
              " lengths of queries, ", call.key_lengths.size(), " of keys");
  const auto [first_key, keys] = packed_range(call.key_lengths, number, call.key.size(dim));
  return {at, first, count, first_key, keys};
}

Request row_request(const FusedInfer& call, int64_t number) {
  const std::string layout = layout_in(call.layout);
  const int64_t queries = tokens_per_row(call.query, layout);
  const int64_t limit =
      call.block_table.defined() ? paged_limit(call) : tokens_per_row(call.key, layout);
  return {number, 0, length_of(call.query_lengths, number, queries), 0,
          length_of(call.key_lengths, number, limit)};
}

std::vector<Request> requests(const FusedInfer& call) {
  std::vector<Request> found;
  if (is_packed(call)) {
    TORCH_CHECK(!call.query_lengths.empty() && !call.key_lengths.empty(), "the layout ",
                call.layout, " needs the lengths of queries and of keys");
    for (size_t i = 0; i < call.query_lengths.size(); ++i) {
      found.push_back(packed_request(call, i));
    }
    return found;
  }
  for (int64_t i = 0; i < call.query.size(0); ++i) found.push_back(row_request(call, i));
  return found;
}

// The first tokens of a request out of the blocks of a cache, as [head, token, element]. Blocks are
// [token, head * element] or [head, token, element].
Tensor gathered(const Tensor& cache, const FusedInfer& call, const Request& request) {
  TORCH_CHECK(cache.dim() == 3 || cache.dim() == 4, "a cache of shape ", cache.sizes(),
              ": only [block, token, head * element] and [block, head, token, element]");
  TORCH_CHECK(cache.size(cache.dim() - 2) == call.block_size, "a cache of shape ", cache.sizes(),
              " for blocks of ", call.block_size, " tokens");
  TORCH_CHECK(request.number < call.block_table.size(0), "the table of blocks has ",
              call.block_table.size(0), " rows, none for request ", request.number);
  const int64_t blocks = (request.keys + call.block_size - 1) / call.block_size;
  const Tensor table = call.block_table.select(0, request.number).narrow(0, 0, blocks);
  const Tensor own = cache.index_select(0, table);
  if (cache.dim() == 4) {
    return own.transpose(0, 1).flatten(1, 2).narrow(1, 0, request.keys);
  }
  return own.flatten(0, 1)
      .narrow(0, 0, request.keys)
      .unflatten(1, {call.key_heads, -1})
      .transpose(0, 1);
}

Tensor keys_of(const Tensor& tensor, const FusedInfer& call, const Request& request) {
  const Tensor own = call.block_table.defined()
                         ? gathered(tensor, call, request)
                         : tokens_of(tensor, layout_in(call.layout), call.key_heads, request.number,
                                     request.first_key, request.keys);
  return own.to(at::kFloat).repeat_interleave(call.heads / call.key_heads, 0);
}

Tensor queries_of(const Tensor& tensor, const FusedInfer& call, const Request& request) {
  return tokens_of(tensor, layout_in(call.layout), call.heads, request.number, request.first_query,
                   request.queries)
      .to(at::kFloat);
}

// The part of a mask of [..., query, key] for a request; its first dimension may be the request's.
Tensor mask_of(const FusedInfer& call, const Request& request) {
  if (!call.mask.defined() || call.mask.numel() == 0) return {};
  Tensor own = call.mask;
  if (own.dim() == 2 && !is_packed(call) &&
      tokens_per_row(call.query, layout_in(call.layout)) == 1 &&
      own.size(0) == call.query.size(0)) {
    own = own.unsqueeze(1);
  }
  if (own.dim() > 2) {
    own = own.select(0, own.size(0) == 1 ? 0 : request.number);
    own = own.flatten(0, own.dim() - 2).narrow(0, 0, own.size(-2));
  }
  TORCH_CHECK(own.size(-2) >= request.queries && own.size(-1) >= request.keys, "a mask of shape ",
              call.mask.sizes(), " for ", request.queries, " queries and ", request.keys, " keys");
  return own.narrow(-2, 0, request.queries).narrow(-1, 0, request.keys);
}

// Modes 2 to 4 take the same mask for all lengths: 2048 x 2048, true above the diagonal.
void check_mask(const FusedInfer& call, const std::vector<Request>& all) {
  constexpr int64_t kSide = 2048;
  if (call.mode < 2) {
    TORCH_CHECK(call.mode == 0 || (call.mask.defined() && call.mask.numel() > 0),
                "sparse mode 1 needs a mask");
    return;
  }
  const Tensor& mask = call.mask;
  TORCH_CHECK(mask.defined() && mask.dim() >= 2 && mask.size(-1) == kSide &&
                  mask.size(-2) == kSide && mask.numel() == kSide * kSide,
              "sparse mode ", call.mode, " needs a mask of 2048 x 2048, not of ",
              mask.defined() ? mask.sizes() : at::IntArrayRef());
  int64_t side = 1;
  for (const Request& request : all) side = std::max({side, request.queries, request.keys});
  side = std::min(side, kSide);
  const Tensor used = mask.reshape({kSide, kSide}).narrow(0, 0, side).narrow(1, 0, side);
  TORCH_CHECK(at::equal(used.to(at::kBool), at::ones({side, side}, at::kBool).triu(1)),
              "the mask of sparse mode ", call.mode, " isn't true exactly above its diagonal");
}

// Where a request's part of the logarithms of sums lies: [token, head, 1] or [row, head, token, 1].
Tensor sums_of(const Tensor& sums, const FusedInfer& call, const Request& request) {
  if (is_packed(call)) {
    return sums.narrow(0, request.first_query, request.queries).squeeze(-1).transpose(0, 1);
  }
  return sums.select(0, request.number).narrow(1, 0, request.queries).squeeze(-1);
}

// A query that sees no key has the result 0 and the sum infinity.
void attend_request(const FusedInfer& call, const Request& request, const Tensor& result,
                    const Tensor& sums) {
  if (request.queries == 0) return;
  const Tensor own = tokens_of(result, layout_out(call.layout), call.heads, request.number,
                               request.first_query, request.queries);
  Tensor query = queries_of(call.query, call, request);
  Tensor key = keys_of(call.key, call, request);
  if (call.query_rope.defined()) {
    query = at::cat({query, queries_of(call.query_rope, call, request)}, -1);
    key = at::cat({key, keys_of(call.key_rope, call, request)}, -1);
  }
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  Tensor scores = query.matmul(key.transpose(1, 2)).mul(call.scale);
  const Tensor hidden =
      hidden_keys(call.mode, mask_of(call, request), call.band, request.queries, request.keys);
  if (hidden.defined()) scores = scores.masked_fill(hidden, -kInfinity);
  Tensor sum = scores.logsumexp({-1}, /*keepdim=*/true);
  if (call.sinks.defined()) {
    sum = sum.logaddexp(call.sinks.to(at::kFloat).reshape({call.heads, 1, 1}));
  }
  const Tensor sees_none = sum.eq(-kInfinity);
  const Tensor weights = scores.sub(sum).exp().masked_fill(sees_none, 0.0);
  own.copy_(weights.matmul(keys_of(call.value, call, request)));
  if (sums.defined()) {
    sums_of(sums, call, request).copy_(sum.masked_fill(sees_none, kInfinity).squeeze(-1));
  }
}

void attend(FusedInfer call, bool wants_sums, const Out& result, const Out& sums) {
  if (call.key_heads == 0) call.key_heads = call.heads;
  TORCH_CHECK(call.heads > 0 && call.heads % call.key_heads == 0, call.heads, " heads for ",
              call.key_heads, " of keys");
  TORCH_CHECK(call.query_rope.defined() == call.key_rope.defined(),
              "the rotary parts of queries and of keys come together or not at all");
  TORCH_CHECK(result.dtype() == call.query.scalar_type() &&
                  call.query.scalar_type() == call.key.scalar_type() &&
                  call.key.scalar_type() == call.value.scalar_type(),
              "queries of ", call.query.scalar_type(), ", keys of ", call.key.scalar_type(),
              ", values of ", call.value.scalar_type(), ", result of ", result.dtype(),
              ": quantised attention isn't simulated");
  TORCH_CHECK(!(call.sinks.defined() && wants_sums),
              "the sums of the softmax with learnable sinks aren't simulated");
  if (call.block_table.defined()) {
    TORCH_CHECK(call.block_table.dim() == 2 && call.block_size > 0 && !call.key_lengths.empty(),
                "a cache in blocks needs a table of two dimensions, the size of the blocks, and "
                "the lengths of the keys");
  }
  const std::string layout = layout_in(call.layout);
  const bool has_one_query = !is_packed(call) && tokens_per_row(call.query, layout) == 1;
  // For a single query without a rotary part the mode has no effect.
  if (has_one_query && !call.query_rope.defined()) call.mode = 0;
  const std::vector<Request> all = requests(call);
  check_mask(call, all);
  const Tensor wanted = wants_sums ? sums.get() : Tensor();
  for (const Request& request : all) attend_request(call, request, result.get(), wanted);
}

// The one tensor of a list: several mean a batch in pieces.
const Tensor& only(const Tensors& list) {
  TORCH_CHECK(list.size() == 1, "keys in ", list.size(), " pieces aren't simulated");
  return list.front();
}

}  // namespace

ACLNN(FusedInferAttentionScoreV2,
      [](Tensor query, Tensors key, Tensors value, Absent<"pse_shift">, Tensor mask,
         Ints query_lengths, Ints key_lengths, Absent<"dequant_scale1">, Absent<"quant_scale1">,
         Absent<"dequant_scale2">, Absent<"quant_scale2">, Absent<"quant_offset2">,
         Absent<"antiquant_scale">, Absent<"antiquant_offset">, Tensor block_table,
         Absent<"query_padding_size">, Absent<"kv_padding_size">, Absent<"key_antiquant_scale">,
         Absent<"key_antiquant_offset">, Absent<"value_antiquant_scale">,
         Absent<"value_antiquant_offset">, Absent<"key_shared_prefix">,
         Absent<"value_shared_prefix">, Ints /*prefix_length*/, int64_t heads, double scale,
         int64_t left, int64_t right, std::string layout, int64_t key_heads, int64_t mode,
         int64_t /*precise*/, int64_t block_size, int64_t /*antiquant_mode*/, bool wants_sums,
         int64_t /*key_mode*/, int64_t /*value_mode*/, Out result, Out sums) {
        attend({query,
                only(key),
                only(value),
                mask,
                block_table,
                {},
                {},
                {},
                query_lengths,
                key_lengths,
                heads,
                key_heads,
                scale,
                {left, right},
                layout,
                mode,
                block_size},
               wants_sums, result, sums);
      })
ACLNN(FusedInferAttentionScoreV3,
      [](Tensor query, Tensors key, Tensors value, Absent<"pse_shift">, Tensor mask,
         Ints query_lengths, Ints key_lengths, Absent<"dequant_scale1">, Absent<"quant_scale1">,
         Absent<"dequant_scale2">, Absent<"quant_scale2">, Absent<"quant_offset2">,
         Absent<"antiquant_scale">, Absent<"antiquant_offset">, Tensor block_table,
         Absent<"query_padding_size">, Absent<"kv_padding_size">, Absent<"key_antiquant_scale">,
         Absent<"key_antiquant_offset">, Absent<"value_antiquant_scale">,
         Absent<"value_antiquant_offset">, Absent<"key_shared_prefix">,
         Absent<"value_shared_prefix">, Ints /*prefix_length*/, Tensor query_rope, Tensor key_rope,
         Absent<"key_rope_antiquant_scale">, int64_t heads, double scale, int64_t left,
         int64_t right, std::string layout, int64_t key_heads, int64_t mode, int64_t /*precise*/,
         int64_t block_size, int64_t /*antiquant_mode*/, bool wants_sums, int64_t /*key_mode*/,
         int64_t /*value_mode*/, Out result, Out sums) {
        attend({query,
                only(key),
                only(value),
                mask,
                block_table,
                query_rope,
                key_rope,
                {},
                query_lengths,
                key_lengths,
                heads,
                key_heads,
                scale,
                {left, right},
                layout,
                mode,
                block_size},
               wants_sums, result, sums);
      })
ACLNN(FusedInferAttentionScoreV4,
      [](Tensor query, Tensors key, Tensors value, Absent<"pse_shift">, Tensor mask,
         Ints query_lengths, Ints key_lengths, Absent<"dequant_scale1">, Absent<"quant_scale1">,
         Absent<"dequant_scale2">, Absent<"quant_scale2">, Absent<"quant_offset2">,
         Absent<"antiquant_scale">, Absent<"antiquant_offset">, Tensor block_table,
         Absent<"query_padding_size">, Absent<"kv_padding_size">, Absent<"key_antiquant_scale">,
         Absent<"key_antiquant_offset">, Absent<"value_antiquant_scale">,
         Absent<"value_antiquant_offset">, Absent<"key_shared_prefix">,
         Absent<"value_shared_prefix">, Ints /*prefix_length*/, Tensor query_rope, Tensor key_rope,
         Absent<"key_rope_antiquant_scale">, Absent<"dequant_scale_query">, Tensor sinks,
         int64_t heads, double scale, int64_t left, int64_t right, std::string layout,
         int64_t key_heads, int64_t mode, int64_t /*precise*/, int64_t block_size,
         int64_t /*antiquant_mode*/, bool wants_sums, int64_t /*key_mode*/, int64_t /*value_mode*/,
         int64_t /*query_mode*/, Out result, Out sums) {
        attend({query,
                only(key),
                only(value),
                mask,
                block_table,
                query_rope,
                key_rope,
                sinks,
                query_lengths,
                key_lengths,
                heads,
                key_heads,
                scale,
                {left, right},
                layout,
                mode,
                block_size},
               wants_sums, result, sums);
      })
// Results over parts of the keys become one result, by the logarithms of the parts' sums.
ACLNN(AttentionUpdate, [](Tensors sums, Tensors results, int64_t /*type*/, Out out, Out sum_out) {
  TORCH_CHECK(!sums.empty() && sums.size() == results.size(), sums.size(), " sums for ",
              results.size(), " results");
  const Tensor all = at::stack(sums);
  const Tensor total = all.logsumexp({0});
  Tensor joined = at::zeros(results[0].sizes(), at::kFloat);
  for (size_t i = 0; i < sums.size(); ++i) {
    joined = joined.add(results[i].to(at::kFloat).mul(sums[i].sub(total).exp().unsqueeze(-1)));
  }
  out = joined;
  if (sum_out) sum_out = total;
})
