// SPDX-License-Identifier: Apache-2.0
// Comparisons, logic, bits, limits and choices.

#include <ATen/ops/clamp.h>
#include <ATen/ops/isin.h>
#include <ATen/ops/scalar_tensor.h>
#include <ATen/ops/where.h>

#include "kernel.h"

using namespace ascend_sim;  // NOLINT: the tables below are written in its words

// A method with another tensor and, under the second name, with a number.
#define COMPARE(tensor_op, number_op, method)                                                \
  ACLNN(tensor_op, [](Tensor self, Tensor other, Out out) { out = self.method(other); })     \
  ACLNN(number_op, [](Tensor self, Scalar other, Out out) { out = self.method(other); })     \
  ACLNN(Inplace##tensor_op, [](Out self, Tensor other) { self = self.get().method(other); }) \
  ACLNN(Inplace##number_op, [](Out self, Scalar other) { self = self.get().method(other); })
#define LOGICAL(op, method)                                                       \
  ACLNN(op, [](Tensor self, Tensor other, Out out) { out = self.method(other); }) \
  ACLNN(Inplace##op, [](Out self, Tensor other) { self = self.get().method(other); })

COMPARE(EqTensor, EqScalar, eq)
COMPARE(NeTensor, NeScalar, ne)
COMPARE(LtTensor, LtScalar, lt)
COMPARE(LeTensor, LeScalar, le)
COMPARE(GtTensor, GtScalar, gt)
COMPARE(GeTensor, GeScalar, ge)
COMPARE(BitwiseAndTensor, BitwiseAndScalar, bitwise_and)
COMPARE(BitwiseOrTensor, BitwiseOrScalar, bitwise_or)
COMPARE(BitwiseXorTensor, BitwiseXorScalar, bitwise_xor)
COMPARE(ClampMinTensor, ClampMin, clamp_min)
COMPARE(ClampMaxTensor, ClampMax, clamp_max)
COMPARE(LeftShift, LeftShifts, bitwise_left_shift)
COMPARE(RightShift, RightShifts, bitwise_right_shift)
LOGICAL(LogicalAnd, logical_and)
LOGICAL(LogicalOr, logical_or)
LOGICAL(LogicalXor, logical_xor)
LOGICAL(Maximum, maximum)
LOGICAL(Minimum, minimum)

ACLNN(LessScalar, [](Tensor self, Scalar other, Out out) { out = self.lt(other); })
ACLNN(Equal, [](Tensor self, Tensor other, Out out) {
  out = at::scalar_tensor(self.equal(other), at::kBool).expand_as(out.get());
})
ACLNN(IsClose, [](Tensor self, Tensor other, double relative, double absolute, bool equal_nan,
                  Out out) { out = self.isclose(other, relative, absolute, equal_nan); })
ACLNN(IsInTensorScalar, [](Tensor elements, Scalar tested, bool assume_unique, bool invert,
                           Out out) { out = at::isin(elements, tested, assume_unique, invert); })
ACLNN(IsInScalarTensor, [](Scalar element, Tensor tested, bool assume_unique, bool invert,
                           Out out) { out = at::isin(element, tested, assume_unique, invert); })
ACLNN(Clamp, [](Tensor self, std::optional<Scalar> min, std::optional<Scalar> max, Out out) {
  out = at::clamp(self, min, max);
})
ACLNN(ClampTensor, [](Tensor self, Tensor min, Tensor max, Out out) {
  const auto optional = [](const Tensor& limit) {
    return limit.defined() ? std::optional<Tensor>(limit) : std::nullopt;
  };
  out = at::clamp(self, optional(min), optional(max));
})
ACLNN(SWhere, [](Tensor condition, Tensor self, Tensor other, Out out) {
  out = at::where(condition, self, other);
})
