// SPDX-License-Identifier: Apache-2.0
// Products of matrices. `cube` says how precise the matrix units may be: the CPU always is exact.

#include "kernel.h"

using namespace ascend_sim;  // NOLINT: the tables below are written in its words

namespace {

// Half precision products are summed in float, and rounded once.
at::ScalarType working_type(const Tensor& tensor) {
  return tensor.is_floating_point() && tensor.element_size() < 4 ? at::kFloat
                                                                 : tensor.scalar_type();
}

Tensor wide(const Tensor& tensor) { return tensor.to(working_type(tensor)); }

}  // namespace

ACLNN(Matmul, [](Tensor self, Tensor other, Out out, int8_t /*cube*/) {
  out = wide(self).matmul(wide(other));
})
ACLNN(Mm,
      [](Tensor self, Tensor other, Out out, int8_t /*cube*/) { out = wide(self).mm(wide(other)); })
ACLNN(BatchMatMul, [](Tensor self, Tensor other, Out out, int8_t /*cube*/) {
  out = wide(self).bmm(wide(other));
})
ACLNN(Mv, [](Tensor self, Tensor vector, Out out, int8_t /*cube*/) {
  out = wide(self).mv(wide(vector));
})
ACLNN(Dot, [](Tensor self, Tensor other, Out out) { out = wide(self).dot(wide(other)); })
ACLNN(Addmm, [](Tensor self, Tensor left, Tensor right, Scalar beta, Scalar alpha, Out out,
                int8_t /*cube*/) { out = wide(self).addmm(wide(left), wide(right), beta, alpha); })
ACLNN(InplaceAddmm,
      [](Out self, Tensor left, Tensor right, Scalar beta, Scalar alpha, int8_t /*cube*/) {
        self = wide(self).addmm(wide(left), wide(right), beta, alpha);
      })
ACLNN(Addmv,
      [](Tensor self, Tensor matrix, Tensor vector, Scalar alpha, Scalar beta, Out out,
         int8_t /*cube*/) { out = wide(self).addmv(wide(matrix), wide(vector), beta, alpha); })
ACLNN(Addbmm,
      [](Tensor self, Tensor left, Tensor right, Scalar beta, Scalar alpha, Out out,
         int8_t /*cube*/) { out = wide(self).addbmm(wide(left), wide(right), beta, alpha); })
ACLNN(Baddbmm,
      [](Tensor self, Tensor left, Tensor right, Scalar beta, Scalar alpha, Out out,
         int8_t /*cube*/) { out = wide(self).baddbmm(wide(left), wide(right), beta, alpha); })
ACLNN(Addr, [](Tensor self, Tensor left, Tensor right, Scalar beta, Scalar alpha, Out out) {
  out = self.addr(left, right, beta, alpha);
})
ACLNN(TransposeBatchMatMul,
      [](Tensor x, Tensor y, Absent<"bias">, Absent<"scale">, Ints order_x, Ints order_y,
         Ints order_out, int8_t /*cube*/, int32_t split, Out out) {
        TORCH_CHECK(split == 1, "only the batch_split_factor 1, not ", split);
        out = wide(x.permute(order_x)).bmm(wide(y.permute(order_y))).permute(order_out);
      })
