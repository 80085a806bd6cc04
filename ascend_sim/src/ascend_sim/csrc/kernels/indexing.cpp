// SPDX-License-Identifier: Apache-2.0
// Elements picked, and written, by index and by mask.

#include <ATen/core/List.h>
#include <ATen/ops/_index_put_impl.h>
#include <ATen/ops/embedding.h>
#include <ATen/ops/embedding_dense_backward.h>
#include <ATen/ops/full.h>
#include <ATen/ops/index.h>
#include <ATen/ops/tensor.h>

#include <algorithm>

#include "kernel.h"

using namespace ascend_sim;  // NOLINT: the tables below are written in its words

namespace {

// torch_npu passes an empty tensor for a dimension that isn't indexed. One that is indexed by an
// empty tensor looks the same, but then there is nothing to do: see `picks_nothing`.
c10::List<std::optional<Tensor>> optional_list(const Tensors& indices) {
  c10::List<std::optional<Tensor>> list;
  for (const Tensor& index : indices) {
    const bool is_given = index.defined() && index.numel() > 0;
    list.push_back(is_given ? std::optional<Tensor>(index) : std::nullopt);
  }
  return list;
}

bool picks_nothing(const Tensors& indices) {
  return std::none_of(indices.begin(), indices.end(),
                      [](const Tensor& index) { return index.defined() && index.numel() > 0; });
}

// scatter, or the reduction with the runtime's number.
Tensor scatter(const Tensor& self, int64_t dim, const Tensor& index, const Tensor& source,
               int64_t reduction) {
  switch (reduction) {
    case 0:
      return self.scatter(dim, index, source);
    case 1:
      return self.scatter(dim, index, source, "add");
    case 2:
      return self.scatter(dim, index, source, "multiply");
    default:
      TORCH_CHECK(false, "no scatter reduction ", reduction);
  }
}

Tensor filled_like(const Tensor& index, const Scalar& value, const Tensor& self) {
  return at::full(index.sizes(), value, self.options());
}

Tensor index_tensor(const Ints& values) { return at::tensor(values, at::kLong); }

}  // namespace

ACLNN(Index, [](Tensor self, Tensors indices, Out out) {
  if (picks_nothing(indices)) return;
  out = at::index(self, optional_list(indices));
})
ACLNN(IndexPutImpl, [](Out self, Tensors indices, Tensor values, bool accumulate, bool unsafe) {
  if (picks_nothing(indices)) return;
  at::_index_put_impl_(const_cast<Tensor&>(self.get()), optional_list(indices), values, accumulate,
                       unsafe);
})
ACLNN(IndexSelect,
      [](Tensor self, int64_t dim, Tensor index, Out out) { out = self.index_select(dim, index); })
ACLNN(IndexCopy, [](Tensor self, int64_t dim, Tensor index, Tensor source, Out out) {
  out = self.index_copy(dim, index.to(at::kLong), source);
})
ACLNN(InplaceIndexCopy, [](Out self, int64_t dim, Tensor index, Tensor source) {
  self.get().index_copy_(dim, index.to(at::kLong), source);
})
ACLNN(IndexAdd, [](Tensor self, int64_t dim, Tensor index, Tensor source, Scalar alpha, Out out) {
  out = self.index_add(dim, index, source, alpha);
})
ACLNN(IndexAddV2,
      [](Tensor self, int64_t dim, Tensor index, Tensor source, Scalar alpha, int64_t /*mode*/,
         Out out) { out = self.index_add(dim, index, source, alpha); })
ACLNN(IndexFill, [](Tensor self, int64_t dim, Tensor index, Scalar value, Out out) {
  out = self.index_fill(dim, index.to(at::kLong), value);
})
ACLNN(InplaceIndexFill, [](Out self, int64_t dim, Tensor index, Scalar value) {
  self.get().index_fill_(dim, index.to(at::kLong), value);
})
ACLNN(IndexFillTensor, [](Tensor self, int64_t dim, Ints index, Scalar value, Out out) {
  out = self.index_fill(dim, index_tensor(index), value);
})
ACLNN(InplaceIndexFillTensor, [](Out self, int64_t dim, Ints index, Scalar value) {
  self.get().index_fill_(dim, index_tensor(index), value);
})
ACLNN(Gather, [](Tensor self, int64_t dim, Tensor index, Out out) {
  out = self.gather(dim, index.to(at::kLong));
})
ACLNN(Take, [](Tensor self, Tensor index, Out out) { out = self.take(index.to(at::kLong)); })
ACLNN(InplacePut, [](Out self, Tensor index, Tensor source, bool accumulate) {
  self.get().put_(index.to(at::kLong), source, accumulate);
})
ACLNN(Scatter, [](Tensor self, int64_t dim, Tensor index, Tensor source, int64_t reduction,
                  Out out) { out = scatter(self, dim, index, source, reduction); })
ACLNN(InplaceScatter, [](Out self, int64_t dim, Tensor index, Tensor source, int64_t reduction) {
  self = scatter(self, dim, index, source, reduction);
})
ACLNN(ScatterValue,
      [](Tensor self, int64_t dim, Tensor index, Scalar value, int64_t reduction, Out out) {
        out = scatter(self, dim, index, filled_like(index, value, self), reduction);
      })
ACLNN(InplaceScatterValue,
      [](Out self, int64_t dim, Tensor index, Scalar value, int64_t reduction) {
        self = scatter(self, dim, index, filled_like(index, value, self), reduction);
      })
ACLNN(ScatterAdd, [](Tensor self, int64_t dim, Tensor index, Tensor source, Out out) {
  out = self.scatter_add(dim, index, source);
})

ACLNN(MaskedSelect, [](Tensor self, Tensor mask, Resized out) { out = self.masked_select(mask); })
ACLNN(InplaceMaskedFillScalar, [](Out self, Tensor mask, Scalar value) {
  self.get().masked_fill_(mask.to(at::kBool), value);
})
ACLNN(InplaceMaskedFillTensor, [](Out self, Tensor mask, Tensor value) {
  self.get().masked_fill_(mask.to(at::kBool), value.reshape({}));
})
ACLNN(InplaceMaskedScatter, [](Out self, Tensor mask, Tensor source) {
  self.get().masked_scatter_(mask.to(at::kBool), source);
})
ACLNN(Nonzero, [](Tensor self, Resized out) { out = self.nonzero(); })
ACLNN(NonzeroV2, [](Tensor self, Resized out) { out = self.nonzero().t(); })

ACLNN(Embedding,
      [](Tensor weight, Tensor indices, Out out) { out = at::embedding(weight, indices); })
ACLNN(EmbeddingDenseBackward,
      [](Tensor gradient, Tensor indices, uint64_t rows, uint64_t padding, bool scale, Out out) {
        out = at::embedding_dense_backward(gradient, indices, static_cast<int64_t>(rows),
                                           static_cast<int64_t>(padding), scale);
      })
