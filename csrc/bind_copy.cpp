// SPDX-License-Identifier: Apache-2.0
// Python face of runs and of the copy engine. These deal in raw addresses, of which a torch op
// knows nothing.

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>

#include "bindings.h"
#include "copy_engine.h"
#include "op_checks.h"
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

// The rows of a [R, 3] tensor; std::invalid_argument unless it is one.
std::pair<const Run*, size_t> runs_of(const at::Tensor& table) {
  if (table.size(1) != 3) {
    throw std::invalid_argument("runs has " + std::to_string(table.size(1)) +
                                " columns, expected 3 (dst_offset, src_offset, nbytes)");
  }
  return {reinterpret_cast<const Run*>(table.const_data_ptr<int64_t>()),
          static_cast<size_t>(table.size(0))};
}

// (bytes, end of the last destination byte, end of the last source byte) of runs in one tensor
// pair.
std::tuple<int64_t, int64_t, int64_t> measure_runs(const at::Tensor& runs) {
  const at::Tensor table = checked_int64("runs", runs, 2);
  const auto [first, count] = runs_of(table);
  const int64_t total = checked_total(first, count);
  int64_t dst_end = 0;
  int64_t src_end = 0;
  for (size_t i = 0; i < count; ++i) {
    dst_end = std::max(dst_end, first[i].dst + first[i].nbytes);
    src_end = std::max(src_end, first[i].src + first[i].nbytes);
  }
  return {total, dst_end, src_end};
}

// Addresses in a region that starts at `from`, as addresses in its mapping at `to`; IndexError
// unless [address, address + extent) of each lies inside the region.
at::Tensor rebase(const at::Tensor& addrs, uint64_t from, uint64_t to, uint64_t nbytes,
                  uint64_t extent) {
  const at::Tensor list = checked_int64("addrs", addrs, 1);
  at::Tensor result = at::empty_like(list);
  const int64_t* values = list.const_data_ptr<int64_t>();
  int64_t* moved = result.mutable_data_ptr<int64_t>();
  for (int64_t i = 0; i < list.numel(); ++i) {
    const uint64_t offset = static_cast<uint64_t>(values[i]) - from;
    TORCH_CHECK_INDEX(offset <= nbytes && extent <= nbytes - offset, "addrs[", i, "] plus ", extent,
                      " bytes is not inside the region of ", nbytes, " bytes");
    moved[i] = static_cast<int64_t>(to + offset);
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
  const auto [first, count] = runs_of(table);
  const int64_t tensors = dst.numel();
  if (tensors > 0 && checked_total(first, count) > std::numeric_limits<int64_t>::max() / tensors) {
    throw std::invalid_argument("runs times tensors exceed 2**63 bytes");
  }
  const TensorPairs pairs{reinterpret_cast<const uint64_t*>(dst.const_data_ptr<int64_t>()),
                          reinterpret_cast<const uint64_t*>(src.const_data_ptr<int64_t>()),
                          static_cast<size_t>(tensors)};
  return copy_runs(pairs, first, count, {at::get_num_threads(), deadline_ns});
}

// What the ops check of their ids, for callers that move bytes without an op.
void check_ids(const std::string& name, const at::Tensor& ids, int64_t rows, bool unique) {
  const at::Tensor list = checked_ids(name.c_str(), ids);
  check_range(name.c_str(), list, rows);
  if (unique) {
    (void)table_of_destinations(name.c_str(), list);
  }
}

}  // namespace

void bind_copy(pybind11::module_& m) {
  namespace py = pybind11;
  m.def("block_runs", &block_runs, py::arg("dst_ids"), py::arg("src_ids"), py::arg("dst_pitch"),
        py::arg("src_pitch"), py::arg("nbytes"), py::call_guard<py::gil_scoped_release>());
  m.def("measure_runs", &measure_runs, py::arg("runs"));
  m.def("rebase", &rebase, py::arg("addrs"), py::arg("from_base"), py::arg("to_base"),
        py::arg("nbytes"), py::arg("extent"));
  m.def("check_ids", &check_ids, py::arg("name"), py::arg("ids"), py::arg("rows"),
        py::arg("unique") = false);
  m.def("copy_runs", &copy_runs_between, py::arg("dst_bases"), py::arg("src_bases"),
        py::arg("runs"), py::arg("deadline_ns") = 0, py::call_guard<py::gil_scoped_release>());
}

}  // namespace llmdd
