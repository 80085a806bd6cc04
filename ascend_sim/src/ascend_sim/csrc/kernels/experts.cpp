// SPDX-License-Identifier: Apache-2.0
// Mixtures of experts: which experts a token goes to, the tokens sorted by expert, products of each
// expert's own tokens, and the tokens' results put together again. A pair is a token and one of its
// choices, token * choices + choice.

#include <ATen/ops/arange.h>
#include <ATen/ops/bincount.h>
#include <ATen/ops/full.h>

#include <algorithm>
#include <limits>

#include "kernel.h"

using namespace ascend_sim;  // NOLINT: the tables below are written in its words

namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

// Scores of the experts of all groups but those with the best ones become minus infinity.
Tensor within_best_groups(const Tensor& scores, int64_t groups, int64_t kept, int64_t mode) {
  if (groups == 1 || kept == groups) return scores;
  TORCH_CHECK(mode == 0 || mode == 1,
              "only the group_select_mode 0 (maximum) and 1 (the best two)");
  const Tensor grouped = scores.unflatten(1, {groups, -1});
  const Tensor of_group = mode == 0 ? grouped.amax({2}) : std::get<0>(grouped.topk(2)).sum({2});
  const Tensor chosen = std::get<1>(of_group.topk(kept));
  const Tensor hidden = at::full(of_group.sizes(), true, at::kBool).scatter(1, chosen, false);
  return grouped.masked_fill(hidden.unsqueeze(2), -kInfinity).flatten(1);
}

// The order of pairs that sorts them by expert, those of one expert as they come.
Tensor by_expert(const Tensor& experts) {
  return std::get<1>(experts.flatten().sort(/*stable=*/true, 0, /*descending=*/false));
}

// Where each pair is in an order of some of them, -1 if it isn't.
Tensor places(const Tensor& order, int64_t pairs) {
  return at::full({pairs}, -1, at::kLong)
      .index_copy(0, order, at::arange(order.size(0), at::kLong));
}

// The number of rows that a group ends at, by a list of such ends (type 0) or of sizes (type 1).
Ints ends_of(const Tensor& list, int64_t type, int64_t rows) {
  TORCH_CHECK(type == 0 || type == 1, "only the group_list_type 0 (ends) and 1 (sizes), not ",
              type);
  const Tensor wide = (type == 0 ? list : list.cumsum(0)).to(at::kLong).contiguous();
  const int64_t* first = wide.const_data_ptr<int64_t>();
  const Ints ends(first, first + wide.numel());
  int64_t start = 0;
  for (const int64_t end : ends) {
    TORCH_CHECK(start <= end && end <= rows, "groups that end at ", ends, " of ", rows, " rows");
    start = end;
  }
  return ends;
}

// One of several matrices, in one tensor or each in its own.
Tensor part(const Tensors& tensors, size_t i) {
  return tensors.size() == 1 ? tensors[0].select(0, static_cast<int64_t>(i)) : tensors[i];
}

void grouped_matmul(const Tensors& x, const Tensors& weight, const Tensors& bias,
                    const Tensor& list, int64_t group_type, int64_t list_type, int64_t activation,
                    const Tensors& out) {
  TORCH_CHECK(
      group_type == 0 && activation == 0 && x.size() == 1 && out.size() == 1 && list.defined(),
      "only one tensor whose rows are in groups (group_type 0), a list of them, and no "
      "activation");
  const Ints ends = ends_of(list, list_type, x[0].size(0));
  const auto matrices = weight.size() == 1 ? static_cast<size_t>(weight[0].size(0)) : weight.size();
  TORCH_CHECK(matrices == ends.size(), matrices, " matrices for ", ends.size(), " groups");
  int64_t start = 0;
  for (size_t i = 0; i < matrices; ++i) {
    const auto of_group = [&](const Tensor& rows) {
      return rows.narrow(0, start, ends[i] - start);
    };
    Tensor product = of_group(x[0]).to(at::kFloat).matmul(part(weight, i).to(at::kFloat));
    if (!bias.empty()) product = product.add(part(bias, i).to(at::kFloat));
    of_group(out[0]).copy_(product);
    start = ends[i];
  }
}

void refuse_quantised(std::initializer_list<const Tensors*> given) {
  for (const Tensors* tensors : given) {
    TORCH_CHECK(tensors->empty(), "quantised products in groups aren't simulated");
  }
}

struct Routing {
  int64_t experts;
  int64_t count_type;  // what is counted: 0 pairs up to an expert, 1 pairs of an expert
  bool counts;
  Ints range;  // the first expert that is active, and the one behind the last; empty: all are
  int64_t index_type;
};

void route(const Tensor& x, const Tensor& experts, const Routing& routing, const Out& rows,
           const Out& index, const Out& counts) {
  const Tensor flat = experts.flatten().to(at::kLong);
  const int64_t pairs = flat.size(0);
  const int64_t first = routing.range.empty() ? 0 : routing.range[0];
  const int64_t end = routing.range.empty() ? routing.experts : routing.range[1];
  TORCH_CHECK(flat.ge(0).logical_and(flat.lt(routing.experts)).all().item<bool>(),
              "numbers of experts that aren't from 0 to ", routing.experts - 1);
  const Tensor order = by_expert(flat);
  const Tensor sorted = flat.index_select(0, order);
  const Tensor active = order.masked_select(sorted.ge(first).logical_and(sorted.lt(end)));
  const int64_t written = std::min(active.size(0), rows.get().size(0));
  const Tensor kept = active.narrow(0, 0, written);
  rows.get().narrow(0, 0, written).copy_(x.index_select(0, kept.floor_divide(pairs / x.size(0))));
  TORCH_CHECK(routing.index_type == 0 || routing.index_type == 1,
              "only the row_idx_type 0 (gather) and 1 (scatter), not ", routing.index_type);
  if (routing.index_type == 0) {
    index = places(kept, pairs);
  } else {
    index.get().narrow(0, 0, written).copy_(kept);
  }
  if (!routing.counts) return;
  TORCH_CHECK(routing.count_type == 0 || routing.count_type == 1,
              "only the expert_tokens_num_type 0 and 1, not ", routing.count_type);
  const Tensor each = at::bincount(flat.index_select(0, active).sub(first), {}, end - first);
  counts = routing.count_type == 0 ? each.cumsum(0) : each;
}

constexpr auto init_routing = [](Tensor x, Tensor experts, Absent<"scale">, Absent<"offset">,
                                 int64_t /*active_num*/, int64_t /*capacity*/, int64_t number,
                                 int64_t drop_pad_mode, int64_t count_type, bool counts,
                                 int64_t quant_mode, Ints range, int64_t index_type, Out rows,
                                 Out index, Out counts_out, Out /*scale_out*/) {
  TORCH_CHECK(drop_pad_mode == 0 && quant_mode == -1,
              "only the drop_pad_mode 0 and the quant_mode -1, not ", drop_pad_mode, " and ",
              quant_mode);
  route(x, experts, {number, count_type, counts, range, index_type}, rows, index, counts_out);
};

}  // namespace

ACLNN(MoeGatingTopKSoftmax,
      [](Tensor x, Absent<"finished">, int64_t k, Out y, Out experts, Out rows) {
        const auto [best, index] = x.to(at::kFloat).softmax(-1).topk(k);
        y = best;
        experts = index;
        const int64_t tokens = index.numel() / k;
        rows = at::arange(tokens * k, at::kLong).reshape({k, tokens}).t().reshape(index.sizes());
      })
ACLNN(MoeGatingTopK, [](Tensor x, Tensor bias, int64_t k, int64_t kept_groups, int64_t groups,
                        int64_t group_mode, int64_t renorm, int64_t norm, bool wants_scores,
                        double factor, double epsilon, Out y, Out experts, Out scores_out) {
  TORCH_CHECK(renorm == 0 && (norm == 0 || norm == 1),
              "only renorm 0, and norm_type 0 "
              "(softmax) and 1 (sigmoid), not ",
              renorm, " and ", norm);
  const Tensor wide = x.to(at::kFloat);
  const Tensor scores = norm == 0 ? wide.softmax(-1) : wide.sigmoid();
  const Tensor biased = bias.defined() ? scores.add(bias.to(at::kFloat)) : scores;
  const Tensor index =
      std::get<1>(within_best_groups(biased, groups, kept_groups, group_mode).topk(k));
  Tensor chosen = scores.gather(1, index);
  if (norm == 1) chosen = chosen.div(chosen.sum({1}, /*keepdim=*/true).add(epsilon));
  y = chosen.mul(factor);
  experts = index;
  if (wants_scores) scores_out = scores;
})
ACLNN(MoeInitRoutingV3, init_routing)
// vllm-ascend's own kernel of that name, with the same arguments: its extension looks here when its
// library of kernels can't be loaded.
ACLNN(MoeInitRoutingCustom, init_routing)
ACLNN(MoeTokenPermute,
      [](Tensor tokens, Tensor experts, int64_t /*count*/, bool padded, Out rows, Out index) {
        TORCH_CHECK(!padded, "padded_mode isn't simulated");
        const Tensor order = by_expert(experts);
        const int64_t pairs = order.size(0);
        rows = tokens.index_select(
            0, order.narrow(0, 0, rows.get().size(0)).floor_divide(pairs / tokens.size(0)));
        index = places(order, pairs);
      })
ACLNN(MoeTokenUnpermute,
      [](Tensor rows, Tensor index, Tensor weights, bool padded, Ints /*shape*/, Out tokens) {
        TORCH_CHECK(!padded, "padded_mode isn't simulated");
        const int64_t count = tokens.get().size(0);
        Tensor own = rows.index_select(0, index).to(at::kFloat).unflatten(0, {count, -1});
        if (weights.defined()) own = own.mul(weights.to(at::kFloat).unsqueeze(2));
        tokens = own.sum({1});
      })
ACLNN(MoeFinalizeRoutingV2, [](Tensor rows, Tensor index, Tensor x1, Tensor x2, Tensor bias,
                               Tensor scales, Tensor experts, int64_t drop_pad_mode, Out tokens) {
  TORCH_CHECK(drop_pad_mode == 0 || drop_pad_mode == 2, "only the drop_pad_mode 0 and 2, not ",
              drop_pad_mode);
  const int64_t count = tokens.get().size(0);
  // In mode 0 the index has all tokens' first choices, then all second ones.
  const Tensor of_pair =
      drop_pad_mode == 2 ? index.reshape({count, -1}) : index.reshape({-1, count}).t();
  Tensor own = rows.index_select(0, of_pair.flatten()).to(at::kFloat);
  own = own.unflatten(0, of_pair.sizes());
  if (bias.defined()) own = own.add(bias.index({experts.to(at::kLong)}).to(at::kFloat));
  if (scales.defined()) own = own.mul(scales.to(at::kFloat).unsqueeze(2));
  Tensor total = own.sum({1});
  for (const Tensor* other : {&x1, &x2}) {
    if (other->defined()) total = total.add(other->to(at::kFloat));
  }
  tokens = total;
})
// torch_npu calls V5, where it finds V4 as well.
ACLNN(GroupedMatmulV4,
      [](Tensors x, Tensors weight, Tensors bias, Tensors scale, Tensors offset,
         Tensors antiquant_scale, Tensors antiquant_offset, Tensors token_scale, Tensor list,
         Tensors /*activation_input*/, Tensors /*activation_scale*/, Tensors /*activation_offset*/,
         int64_t /*split*/, int64_t group_type, int64_t list_type, int64_t activation, Tensors out,
         Tensors /*activation_out*/, Tensors /*scale_out*/) {
        refuse_quantised({&scale, &offset, &antiquant_scale, &antiquant_offset, &token_scale});
        grouped_matmul(x, weight, bias, list, group_type, list_type, activation, out);
      })
ACLNN(GroupedMatmulV5,
      [](Tensors x, Tensors weight, Tensors bias, Tensors scale, Tensors offset,
         Tensors antiquant_scale, Tensors antiquant_offset, Tensors token_scale, Tensor list,
         Tensors /*activation_input*/, Tensors /*activation_scale*/, Tensors /*activation_offset*/,
         int64_t /*split*/, int64_t group_type, int64_t list_type, int64_t activation,
         Ints /*tuning*/, Tensors out, Tensors /*activation_out*/, Tensors /*scale_out*/) {
        refuse_quantised({&scale, &offset, &antiquant_scale, &antiquant_offset, &token_scale});
        grouped_matmul(x, weight, bias, list, group_type, list_type, activation, out);
      })
