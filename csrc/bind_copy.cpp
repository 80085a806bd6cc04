// SPDX-License-Identifier: Apache-2.0
// Python face of runs and of the copy engine. These deal in raw addresses, of which a torch op
// knows nothing.

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/csrc/utils/pybind.h>

#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>

#include "bindings.h"
#include "copy_engine.h"
#include "runs.h"

namespace llmdd {
namespace {

// The tensor itself, or a contiguous copy; std::invalid_argument (ValueError) unless int64 on the
// CPU of `dims` dimensions.
at::Tensor checked_int64(const char* name, const at::Tensor& tensor, int64_t dims) {
  if (!tensor.is_cpu() || tensor.scalar_type() != at::kLong || tensor.dim() != dims) {
    throw std::invalid_argument(std::string(name) + " must be a " + std::to_string(dims) +
                                "-D int64 tensor on the CPU");
  }
  return tensor.contiguous();
}

at::Tensor block_runs(const at::Tensor& dst_ids, const at::Tensor& src_ids, int64_t dst_pitch,
                      int64_t src_pitch, int64_t nbytes) {
  const at::Tensor dst = checked_int64("dst_ids", dst_ids, 1);
  const at::Tensor src = checked_int64("src_ids", src_ids, 1);
  if (dst.numel() != src.numel()) {
    throw std::invalid_argument("dst_ids has " + std::to_string(dst.numel()) +
                                " ids, but src_ids " + std::to_string(src.numel()));
  }
  const std::vector<Run> runs =
      merge_blocks(dst.const_data_ptr<int64_t>(), src.const_data_ptr<int64_t>(),
                   static_cast<size_t>(dst.numel()), {dst_pitch, src_pitch, nbytes});
  static_assert(sizeof(Run) == 3 * sizeof(int64_t), "a Run is a row of the tensor");
  at::Tensor result = at::empty({static_cast<int64_t>(runs.size()), 3}, at::kLong);
  if (!runs.empty()) {
    std::memcpy(result.mutable_data_ptr<int64_t>(), runs.data(), runs.size() * sizeof(Run));
  }
  return result;
}

int64_t copy_runs_between(const at::Tensor& dst_bases, const at::Tensor& src_bases,
                          const at::Tensor& runs, int64_t deadline_ns) {
  const at::Tensor dst = checked_int64("dst_bases", dst_bases, 1);
  const at::Tensor src = checked_int64("src_bases", src_bases, 1);
  const at::Tensor table = checked_int64("runs", runs, 2);
  if (dst.numel() != src.numel()) {
    throw std::invalid_argument("dst_bases has " + std::to_string(dst.numel()) +
                                " addresses, but src_bases " + std::to_string(src.numel()));
  }
  if (table.size(1) != 3) {
    throw std::invalid_argument("runs has " + std::to_string(table.size(1)) +
                                " columns, expected 3 (dst_offset, src_offset, nbytes)");
  }
  const auto* first = reinterpret_cast<const Run*>(table.const_data_ptr<int64_t>());
  const size_t count = static_cast<size_t>(table.size(0));
  const int64_t tensors = dst.numel();
  if (tensors > 0 && checked_total(first, count) > std::numeric_limits<int64_t>::max() / tensors) {
    throw std::invalid_argument("runs times tensors exceed 2**63 bytes");
  }
  const TensorPairs pairs{reinterpret_cast<const uint64_t*>(dst.const_data_ptr<int64_t>()),
                          reinterpret_cast<const uint64_t*>(src.const_data_ptr<int64_t>()),
                          static_cast<size_t>(tensors)};
  return copy_runs(pairs, first, count, {at::get_num_threads(), deadline_ns});
}

}  // namespace

void bind_copy(pybind11::module_& m) {
  namespace py = pybind11;
  m.def("block_runs", &block_runs, py::arg("dst_ids"), py::arg("src_ids"), py::arg("dst_pitch"),
        py::arg("src_pitch"), py::arg("nbytes"), py::call_guard<py::gil_scoped_release>());
  m.def("copy_runs", &copy_runs_between, py::arg("dst_bases"), py::arg("src_bases"),
        py::arg("runs"), py::arg("deadline_ns") = 0, py::call_guard<py::gil_scoped_release>());
}

}  // namespace llmdd
