// SPDX-License-Identifier: Apache-2.0
// Functions of each element: of one tensor, and arithmetic of two.

#include <ATen/ops/fmod.h>
#include <ATen/ops/gelu.h>
#include <ATen/ops/hardsigmoid.h>
#include <ATen/ops/hardswish.h>
#include <ATen/ops/log_sigmoid.h>
#include <ATen/ops/mish.h>
#include <ATen/ops/pow.h>
#include <ATen/ops/remainder.h>
#include <ATen/ops/rsub.h>
#include <ATen/ops/silu.h>

#include "kernel.h"

using namespace ascend_sim;  // NOLINT: the tables below are written in its words

namespace {

// "trunc" and "floor" as the runtime numbers them.
std::optional<c10::string_view> rounding(int mode) {
  if (mode == 0) return std::nullopt;
  TORCH_CHECK(mode == 1 || mode == 2, "no rounding mode ", mode);
  return mode == 1 ? "trunc" : "floor";
}

}  // namespace

// An expression in `x`, as a function with a result of its own and as one that changes its
// argument.
#define UNARY(op, expression)                            \
  ACLNN(op, [](Tensor x, Out out) { out = expression; }) \
  ACLNN(Inplace##op, [](Out self) {                      \
    const Tensor& x = self;                              \
    self = expression;                                   \
  })

// Expressions in `self`, `other` and `alpha`; `other` is a tensor in the first name and a number in
// the second.
#define BINARY(op, expression)                                            \
  ACLNN(op, [](Tensor self, Tensor other, Out out) { out = expression; }) \
  ACLNN(Inplace##op, [](Out ref, Tensor other) {                          \
    const Tensor& self = ref;                                             \
    ref = expression;                                                     \
  })
#define BINARY_NUMBER(op, expression)                                     \
  ACLNN(op, [](Tensor self, Scalar other, Out out) { out = expression; }) \
  ACLNN(Inplace##op, [](Out ref, Scalar other) {                          \
    const Tensor& self = ref;                                             \
    ref = expression;                                                     \
  })
#define SCALED(op, expression)                                                          \
  ACLNN(op, [](Tensor self, Tensor other, Scalar alpha, Out out) { out = expression; }) \
  ACLNN(Inplace##op, [](Out ref, Tensor other, Scalar alpha) {                          \
    const Tensor& self = ref;                                                           \
    ref = expression;                                                                   \
  })
#define SCALED_NUMBER(op, expression)                                                   \
  ACLNN(op, [](Tensor self, Scalar other, Scalar alpha, Out out) { out = expression; }) \
  ACLNN(Inplace##op, [](Out ref, Scalar other, Scalar alpha) {                          \
    const Tensor& self = ref;                                                           \
    ref = expression;                                                                   \
  })

// clang-format off
UNARY(Abs, x.abs())
UNARY(Acos, x.acos())
UNARY(Acosh, x.acosh())
UNARY(Asin, x.asin())
UNARY(Asinh, x.asinh())
UNARY(Atan, x.atan())
UNARY(Atanh, x.atanh())
UNARY(BitwiseNot, x.bitwise_not())
UNARY(Ceil, x.ceil())
UNARY(Cos, x.cos())
UNARY(Cosh, x.cosh())
UNARY(Erf, x.erf())
UNARY(Erfc, x.erfc())
UNARY(Erfinv, x.erfinv())
UNARY(Exp, x.exp())
UNARY(Exp2, x.exp2())
UNARY(Expm1, x.expm1())
UNARY(Floor, x.floor())
UNARY(Frac, x.frac())
UNARY(Hardsigmoid, at::hardsigmoid(x))
UNARY(Hardswish, at::hardswish(x))
UNARY(IsFinite, x.isfinite())
UNARY(IsNegInf, x.isneginf())
UNARY(IsPosInf, x.isposinf())
UNARY(Log, x.log())
UNARY(Log10, x.log10())
UNARY(Log1p, x.log1p())
UNARY(Log2, x.log2())
UNARY(LogSigmoid, at::log_sigmoid(x))
UNARY(LogicalNot, x.logical_not())
UNARY(Mish, at::mish(x))
UNARY(Neg, x.neg())
UNARY(Reciprocal, x.reciprocal())
UNARY(Relu, x.relu())
UNARY(Round, x.round())
UNARY(Rsqrt, x.rsqrt())
UNARY(Sigmoid, x.sigmoid())
UNARY(Sign, x.sign())
UNARY(Signbit, x.signbit())
UNARY(Silu, at::silu(x))
UNARY(Sin, x.sin())
UNARY(Sinc, x.sinc())
UNARY(Sinh, x.sinh())
UNARY(Sqrt, x.sqrt())
UNARY(Tan, x.tan())
UNARY(Tanh, x.tanh())
UNARY(Trunc, x.trunc())
UNARY(Gelu, at::gelu(x))

SCALED(Add, self.add(other, alpha))
SCALED_NUMBER(Adds, self.add(other, alpha))
SCALED(Sub, self.sub(other, alpha))
SCALED_NUMBER(Subs, self.sub(other, alpha))
SCALED(Rsub, at::rsub(self, other, alpha))
SCALED_NUMBER(Rsubs, at::rsub(self, other, alpha))
BINARY(Mul, self.mul(other))
BINARY_NUMBER(Muls, self.mul(other))
BINARY(Div, self.div(other))
BINARY_NUMBER(Divs, self.div(other))
BINARY(FloorDivide, self.floor_divide(other))
BINARY_NUMBER(FloorDivides, self.floor_divide(other))
BINARY(FmodTensor, self.fmod(other))
BINARY_NUMBER(FmodScalar, self.fmod(other))
BINARY(RemainderTensorTensor, self.remainder(other))
BINARY_NUMBER(RemainderTensorScalar, self.remainder(other))
BINARY(PowTensorTensor, self.pow(other))
BINARY_NUMBER(PowTensorScalar, self.pow(other))
BINARY(Atan2, self.atan2(other))
// clang-format on

ACLNN(RemainderScalarTensor,
      [](Scalar self, Tensor other, Out out) { out = at::remainder(self, other); })
ACLNN(PowScalarTensor, [](Scalar self, Tensor exponent, Out out) { out = at::pow(self, exponent); })
ACLNN(DivMod,
      [](Tensor self, Tensor other, int mode, Out out) { out = self.div(other, rounding(mode)); })
ACLNN(DivMods,
      [](Tensor self, Scalar other, int mode, Out out) { out = self.div(other, rounding(mode)); })
ACLNN(InplaceDivMod,
      [](Out self, Tensor other, int mode) { self = self.get().div(other, rounding(mode)); })
ACLNN(InplaceDivMods,
      [](Out self, Scalar other, int mode) { self = self.get().div(other, rounding(mode)); })
ACLNN(AddV3,
      [](Scalar self, Tensor other, Scalar alpha, Out out) { out = other.mul(alpha).add(self); })
ACLNN(Addcmul, [](Tensor self, Tensor tensor1, Tensor tensor2, Scalar value, Out out) {
  out = self.addcmul(tensor1, tensor2, value);
})
ACLNN(Addcdiv, [](Tensor self, Tensor tensor1, Tensor tensor2, Scalar value, Out out) {
  out = self.addcdiv(tensor1, tensor2, value);
})
ACLNN(InplaceAddcmul, [](Out self, Tensor tensor1, Tensor tensor2, Scalar value) {
  self = self.get().addcmul(tensor1, tensor2, value);
})
ACLNN(InplaceAddcdiv, [](Out self, Tensor tensor1, Tensor tensor2, Scalar value) {
  self = self.get().addcdiv(tensor1, tensor2, value);
})
ACLNN(Lerp, [](Tensor self, Tensor end, Tensor weight, Out out) { out = self.lerp(end, weight); })
ACLNN(Lerps, [](Tensor self, Tensor end, Scalar weight, Out out) { out = self.lerp(end, weight); })
ACLNN(InplaceLerp, [](Out self, Tensor end, Tensor weight) { self = self.get().lerp(end, weight); })
ACLNN(InplaceLerps,
      [](Out self, Tensor end, Scalar weight) { self = self.get().lerp(end, weight); })
ACLNN(LogAddExp, [](Tensor self, Tensor other, Out out) { out = self.logaddexp(other); })
ACLNN(RoundDecimals, [](Tensor self, int64_t decimals, Out out) { out = self.round(decimals); })
ACLNN(InplaceRoundDecimals, [](Out self, int64_t decimals) { self = self.get().round(decimals); })
ACLNN(LogSigmoidForward, [](Tensor self, Out out, Out /*buffer*/) { out = at::log_sigmoid(self); })
ACLNN(GeluV2, [](Tensor self, int64_t approximate, Out out) {
  out = at::gelu(self, approximate == 1 ? "tanh" : "none");
})
ACLNN(NanToNum, [](Tensor self, float nan, float inf, float minus_inf, Out out) {
  out = self.nan_to_num(nan, inf, minus_inf);
})
ACLNN(InplaceNanToNum, [](Out self, float nan, float inf, float minus_inf) {
  self = self.get().nan_to_num(nan, inf, minus_inf);
})
