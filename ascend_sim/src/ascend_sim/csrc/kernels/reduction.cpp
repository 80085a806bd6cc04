// SPDX-License-Identifier: Apache-2.0
// Sums, extremes and other reductions; order: sort, top k, unique.

#include <ATen/ops/_unique2.h>
#include <ATen/ops/bincount.h>
#include <ATen/ops/bucketize.h>
#include <ATen/ops/cummax.h>
#include <ATen/ops/cummin.h>
#include <ATen/ops/histc.h>
#include <ATen/ops/linalg_vector_norm.h>
#include <ATen/ops/norm.h>
#include <ATen/ops/searchsorted.h>
#include <ATen/ops/std_mean.h>
#include <ATen/ops/unique_consecutive.h>
#include <ATen/ops/unique_dim.h>
#include <ATen/ops/var_mean.h>

#include <limits>

#include "kernel.h"

using namespace ascend_sim;  // NOLINT: the tables below are written in its words

namespace {

// No dimensions means all of them.
at::OptionalIntArrayRef dims_or_all(const Ints& dims) {
  return dims.empty() ? at::OptionalIntArrayRef() : at::OptionalIntArrayRef(dims);
}

// The value of `dim` that stands for "of the flattened tensor".
constexpr int64_t kNoDim = 1000;

// Writes both results of a call that makes values and indices.
void assign(const Out& values, const Out& indices, const std::tuple<Tensor, Tensor>& results) {
  values = std::get<0>(results);
  if (indices) indices = std::get<1>(results);
}

// Scores that stay for sampling: the k largest of a row, and of those the fewest whose
// probabilities sum up to p; all others become minus infinity. Either may be undefined.
Tensor kept_for_sampling(const Tensor& scores, const Tensor& p, const Tensor& k) {
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  const auto [ascending, order] = scores.to(at::kFloat).sort(-1);
  Tensor kept = ascending;
  if (k.defined()) {
    const Tensor place = k.to(at::kLong).neg().add(scores.size(-1)).clamp(0).unsqueeze(-1);
    kept = kept.masked_fill(kept.lt(kept.gather(-1, place)), -kInfinity);
  }
  if (p.defined()) {
    const Tensor sums = kept.softmax(-1).cumsum(-1);
    const Tensor hidden = sums.le(p.to(at::kFloat).neg().add(1).unsqueeze(-1));
    hidden.select(-1, -1).fill_(false);  // the largest always stays
    kept = kept.masked_fill(hidden, -kInfinity);
  }
  return kept.scatter(-1, order, kept);
}

}  // namespace

ACLNN(ReduceSum, [](Tensor self, Ints dims, bool keep, at::ScalarType dtype, Out out) {
  out = self.sum(dims_or_all(dims), keep, dtype);
})
ACLNN(ReduceNansum, [](Tensor self, Ints dims, bool keep, at::ScalarType dtype, Out out) {
  out = self.nansum(dims_or_all(dims), keep, dtype);
})
ACLNN(Mean, [](Tensor self, Ints dims, bool keep, at::ScalarType dtype, Out out) {
  out = self.mean(dims_or_all(dims), keep, dtype);
})
ACLNN(Prod, [](Tensor self, at::ScalarType dtype, Out out) { out = self.prod(dtype); })
ACLNN(ProdDim, [](Tensor self, int64_t dim, bool keep, at::ScalarType dtype, Out out) {
  out = self.prod(dim, keep, dtype);
})
ACLNN(Cumsum, [](Tensor self, int64_t dim, at::ScalarType dtype, Out out) {
  out = self.cumsum(dim, dtype);
})
ACLNN(Cumprod, [](Tensor self, Scalar dim, at::ScalarType dtype, Out out) {
  out = self.cumprod(dim.toLong(), dtype);
})
ACLNN(Cummax, [](Tensor self, int64_t dim, Out values, Out indices) {
  assign(values, indices, at::cummax(self, dim));
})
ACLNN(Cummin, [](Tensor self, int64_t dim, Out values, Out indices) {
  assign(values, indices, at::cummin(self, dim));
})
ACLNN(VarCorrection, [](Tensor self, Ints dims, int64_t correction, bool keep, Out out) {
  out = self.var(dims_or_all(dims), correction, keep);
})
ACLNN(Std, [](Tensor self, Ints dims, int64_t correction, bool keep, Out out) {
  out = self.std(dims_or_all(dims), correction, keep);
})
ACLNN(VarMean, [](Tensor self, Ints dims, int64_t correction, bool keep, Out var, Out mean) {
  assign(var, mean, at::var_mean(self, dims_or_all(dims), correction, keep));
})
ACLNN(StdMeanCorrection,
      [](Tensor self, Ints dims, int64_t correction, bool keep, Out std, Out mean) {
        assign(std, mean, at::std_mean(self, dims_or_all(dims), correction, keep));
      })
ACLNN(LogSumExp,
      [](Tensor self, Ints dims, bool keep, Out out) { out = self.logsumexp(dims, keep); })
ACLNN(Norm, [](Tensor self, std::optional<Scalar> p, Ints dims, bool keep, Out out) {
  out = at::norm(self, p, dims, keep, out.dtype());
})
ACLNN(LinalgVectorNorm,
      [](Tensor self, Scalar order, Ints dims, bool keep, at::ScalarType dtype, Out out) {
        out = at::linalg_vector_norm(self, order, dims_or_all(dims), keep, dtype);
      })

ACLNN(All,
      [](Tensor self, Ints dims, bool keep, Out out) { out = self.all(dims_or_all(dims), keep); })
ACLNN(Any,
      [](Tensor self, Ints dims, bool keep, Out out) { out = self.any(dims_or_all(dims), keep); })
ACLNN(Amax, [](Tensor self, Ints dims, bool keep, Out out) { out = self.amax(dims, keep); })
ACLNN(Amin, [](Tensor self, Ints dims, bool keep, Out out) { out = self.amin(dims, keep); })
ACLNN(Aminmax, [](Tensor self, Ints dims, bool keep, Out min, Out max) {
  min = self.amin(dims, keep);
  max = self.amax(dims, keep);
})
ACLNN(AminmaxAll, [](Tensor self, Out min, Out max) {
  min = self.min();
  max = self.max();
})
ACLNN(AminmaxDim, [](Tensor self, int64_t dim, bool keep, Out min, Out max) {
  min = self.amin({dim}, keep);
  max = self.amax({dim}, keep);
})
ACLNN(Max, [](Tensor self, Out out) { out = self.max(); })
ACLNN(Min, [](Tensor self, Out out) { out = self.min(); })
ACLNN(MaxDim, [](Tensor self, int64_t dim, bool keep, Out values, Out indices) {
  assign(values, indices, self.max(dim, keep));
})
ACLNN(MinDim, [](Tensor self, int64_t dim, bool keep, Out values, Out indices) {
  assign(values, indices, self.min(dim, keep));
})
ACLNN(ArgMax, [](Tensor self, int64_t dim, bool keep, Out out) { out = self.argmax(dim, keep); })
ACLNN(ArgMin, [](Tensor self, int64_t dim, bool keep, Out out) { out = self.argmin(dim, keep); })
ACLNN(Median, [](Tensor self, Out out) { out = self.median(); })
ACLNN(MedianDim, [](Tensor self, int64_t dim, bool keep, Out values, Out indices) {
  assign(values, indices, self.median(dim, keep));
})
ACLNN(Kthvalue, [](Tensor self, int64_t k, int64_t dim, bool keep, Out values, Out indices) {
  assign(values, indices, self.kthvalue(k, dim, keep));
})
ACLNN(Trace, [](Tensor self, Out out) { out = self.trace(); })
ACLNN(Bincount, [](Tensor self, Tensor weights, int64_t min_length, Out out) {
  const auto optional = weights.defined() ? std::optional<Tensor>(weights) : std::nullopt;
  out = at::bincount(self, optional, min_length);
})

ACLNN(Sort, [](Tensor self, bool stable, int64_t dim, bool descending, Out values, Out indices) {
  assign(values, indices, self.sort(stable, dim, descending));
})
ACLNN(Topk, [](Tensor self, int64_t k, int64_t dim, bool largest, bool sorted, Out values,
               Out indices) { assign(values, indices, self.topk(k, dim, largest, sorted)); })
ACLNN(SearchSorted,
      [](Tensor sequence, Tensor self, bool int32, bool right, Tensor sorter, Out out) {
        const auto order = sorter.defined() ? std::optional<Tensor>(sorter) : std::nullopt;
        out = at::searchsorted(sequence, self, int32, right, std::nullopt, order);
      })
ACLNN(SearchSorteds,
      [](Tensor sequence, Scalar self, bool int32, bool right, Tensor sorter, Out out) {
        const auto order = sorter.defined() ? std::optional<Tensor>(sorter) : std::nullopt;
        out = at::searchsorted(sequence, self, int32, right, std::nullopt, order);
      })
ACLNN(Bucketize, [](Tensor self, Tensor boundaries, bool int32, bool right, Out out) {
  out = at::bucketize(self, boundaries, int32, right);
})
ACLNN(Unique, [](Tensor self, bool sorted, bool with_inverse, Resized values, Out inverse) {
  const auto results = at::_unique2(self, sorted, with_inverse, false);
  values = std::get<0>(results);
  if (with_inverse) inverse = std::get<1>(results);
})
ACLNN(Unique2, [](Tensor self, bool sorted, bool with_inverse, bool with_counts, Resized values,
                  Out inverse, Resized counts) {
  const auto results = at::_unique2(self, sorted, with_inverse || with_counts, with_counts);
  values = std::get<0>(results);
  if (with_inverse || with_counts) inverse = std::get<1>(results);
  if (with_counts) counts = std::get<2>(results);
})
ACLNN(UniqueDim, [](Tensor self, bool sorted, bool with_inverse, int64_t dim, Resized values,
                    Out inverse, Resized counts) {
  const auto results = at::unique_dim(self, dim, sorted, with_inverse, /*return_counts=*/true);
  values = std::get<0>(results);
  if (with_inverse) inverse = std::get<1>(results);
  counts = std::get<2>(results);
})
ACLNN(Histc, [](Tensor self, int64_t bins, Scalar min, Scalar max, Out out) {
  out = at::histc(self.to(at::kFloat), bins, min, max);
})
ACLNN(UniqueConsecutive, [](Tensor self, bool with_inverse, bool with_counts, int64_t dim,
                            Resized values, Out inverse, Resized counts) {
  const auto chosen = dim == kNoDim ? std::nullopt : std::optional<int64_t>(dim);
  const auto results = at::unique_consecutive(self, with_inverse, with_counts, chosen);
  values = std::get<0>(results);
  if (with_inverse) inverse = std::get<1>(results);
  if (with_counts) counts = std::get<2>(results);
})
ACLNN(ApplyTopKTopP,
      [](Tensor scores, Tensor p, Tensor k, Out out) { out = kept_for_sampling(scores, p, k); })
