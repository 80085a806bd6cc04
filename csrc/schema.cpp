// SPDX-License-Identifier: Apache-2.0
// Schemas of the ops that copy between tensors, and nothing else. Kernels register themselves in
// ops_<device>.cpp, fake kernels in ops.py. `non_blocking` leaves the copies on the device's
// current stream, where there is one; host memory must then live until the stream has passed
// (ops.py sees to it).

#include <torch/library.h>

TORCH_LIBRARY(llm_datadist_torch, m) {
  m.def(
      "copy_blocks(Tensor(a!)[] tensors, Tensor src_ids, Tensor dst_ids, *, bool "
      "non_blocking=False) -> ()",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "swap_blocks(Tensor(a!)[] dst, Tensor[] src, Tensor dst_ids, Tensor src_ids, *, bool "
      "non_blocking=False) -> ()",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "copy_rows(Tensor(a!)[] dst, Tensor[] src, int dst_row, int src_row, int offset, int nbytes, "
      "*, bool non_blocking=False) -> ()",
      {at::Tag::pt2_compliant_tag});
}
