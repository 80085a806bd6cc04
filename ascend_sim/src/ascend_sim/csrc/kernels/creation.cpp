// SPDX-License-Identifier: Apache-2.0
// Copies and casts, constants and sequences, and tensors made of the elements of others.

#include <ATen/ops/arange.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/complex.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/eye.h>
#include <ATen/ops/linspace.h>
#include <ATen/ops/logspace.h>
#include <ATen/ops/repeat_interleave.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/where.h>

#include "kernel.h"

using namespace ascend_sim;  // NOLINT: the tables below are written in its words

ACLNN(InplaceCopy, [](Out self, Tensor source) { self = source.expand_as(self.get()); })
ACLNN(Cast, [](Tensor self, at::ScalarType dtype, Out out) { out = self.to(dtype); })
ACLNN(Complex, [](Tensor real, Tensor imag, Out out) { out = at::complex(real, imag); })

ACLNN(InplaceZero, [](Out self) { self.get().zero_(); })
ACLNN(InplaceOne, [](Out self) { self.get().fill_(1); })
ACLNN(InplaceFillScalar, [](Out self, Scalar value) { self.get().fill_(value); })
ACLNN(InplaceFillTensor, [](Out self, Tensor value) { self.get().fill_(value.reshape({})); })
ACLNN(InplaceFillDiagonal,
      [](Out self, Scalar value, bool wrap) { self.get().fill_diagonal_(value, wrap); })
ACLNN(Eye, [](int64_t rows, int64_t columns, Out out) {
  out = at::eye(rows, columns, out.get().options());
})
ACLNN(Arange, [](Scalar start, Scalar end, Scalar step, Out out) {
  out = at::arange(start, end, step, out.get().options());
})
// Unlike arange, the end belongs to it, and the caller's tensor says how many there are.
ACLNN(Range, [](Scalar start, Scalar /*end*/, Scalar step, Out out) {
  const auto counts = at::arange(out.get().numel(), at::kLong);
  out = counts.mul(step).add(start);
})
ACLNN(Linspace, [](Scalar start, Scalar end, int64_t steps, Out out) {
  out = at::linspace(start, end, steps, out.get().options());
})
ACLNN(LogSpace, [](Scalar start, Scalar end, int64_t steps, double base, Out out) {
  out = at::logspace(start, end, steps, base, out.get().options());
})

ACLNN(Cat, [](Tensors tensors, int64_t dim, Out out) { out = at::cat(tensors, dim); })
ACLNN(Stack, [](Tensors tensors, int64_t dim, Out out) { out = at::stack(tensors, dim); })
ACLNN(Repeat, [](Tensor self, Ints repeats, Out out) { out = self.repeat(repeats); })
ACLNN(Flip, [](Tensor self, Ints dims, Out out) { out = self.flip(dims); })
ACLNN(Roll, [](Tensor self, Ints shifts, Ints dims, Out out) { out = self.roll(shifts, dims); })
ACLNN(ConstantPadNd, [](Tensor self, Ints pad, Scalar value, Out out) {
  out = at::constant_pad_nd(self, pad, value);
})
ACLNN(Tril, [](Tensor self, int64_t diagonal, Out out) { out = self.tril(diagonal); })
ACLNN(Triu, [](Tensor self, int64_t diagonal, Out out) { out = self.triu(diagonal); })
ACLNN(InplaceTril, [](Out self, int64_t diagonal) { self = self.get().tril(diagonal); })
ACLNN(InplaceTriu, [](Out self, int64_t diagonal) { self = self.get().triu(diagonal); })
ACLNN(OneHot, [](Tensor self, int64_t depth, Tensor on, Tensor off, int64_t axis, Out out) {
  TORCH_CHECK(axis == -1, "only for the last axis, not ", axis);
  const auto range = at::arange(depth, self.options());
  out = at::where(self.unsqueeze(-1).eq(range), on, off);
})
ACLNN(RepeatInterleaveTensor,
      [](Tensor repeats, int64_t size, Out out) { out = at::repeat_interleave(repeats, size); })
ACLNN(RepeatInterleave, [](Tensor self, Tensor repeats, int64_t size, Out out) {
  out = self.flatten().repeat_interleave(repeats, std::nullopt, size);
})
ACLNN(RepeatInterleaveWithDim, [](Tensor self, Tensor repeats, int64_t dim, int64_t size, Out out) {
  out = self.repeat_interleave(repeats, dim, size);
})
ACLNN(RepeatInterleaveInt, [](Tensor self, int64_t repeats, int64_t size, Out out) {
  out = self.flatten().repeat_interleave(repeats, std::nullopt, size);
})
ACLNN(RepeatInterleaveIntWithDim, [](Tensor self, int64_t repeats, int64_t dim, int64_t size,
                                     Out out) { out = self.repeat_interleave(repeats, dim, size); })
