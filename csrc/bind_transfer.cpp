// SPDX-License-Identifier: Apache-2.0
// Python face of what reaches into another process of this machine: mappings of its shareable
// regions, counters in them, and process_vm_readv/writev. What may take long releases the GIL.

#include <torch/extension.h>

#include "bindings.h"
#include "host_region.h"
#include "process_memory.h"
#include "tensor_args.h"
#include "words.h"

namespace llmdd {
namespace {

namespace py = pybind11;

std::pair<uint64_t, int> move_bytes(Direction direction, int64_t pid, const at::Tensor& local_bases,
                                    const at::Tensor& remote_bases, const at::Tensor& runs,
                                    int64_t deadline_ns) {
  check_index_tensor(local_bases, "local_bases", 1);
  check_index_tensor(remote_bases, "remote_bases", 1);
  check_index_tensor(runs, "runs", 2);
  TORCH_CHECK_VALUE(runs.size(1) == 3, "runs must have 3 columns, not ", runs.size(1));
  TORCH_CHECK_VALUE(local_bases.size(0) == remote_bases.size(0), "local_bases has ",
                    local_bases.size(0), " entries, remote_bases ", remote_bases.size(0));
  TORCH_CHECK_VALUE(pid > 0 && pid <= INT32_MAX, "pid=", pid, " is no process id");
  const at::Tensor local = local_bases.contiguous();
  const at::Tensor remote = remote_bases.contiguous();
  const at::Tensor moves = runs.contiguous();
  const int64_t* rows = moves.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < moves.size(0); ++i) {
    const int64_t* row = rows + 3 * i;
    TORCH_CHECK_VALUE(row[0] >= 0 && row[1] >= 0 && row[2] >= 0, "runs[", i, "]=(", row[0], ", ",
                      row[1], ", ", row[2], ") has a negative number");
  }
  const RemoteCopy copy{as_addresses(local), as_addresses(remote),
                        static_cast<size_t>(local.size(0)), rows,
                        static_cast<size_t>(moves.size(0))};
  const RemoteCopyResult result =
      copy_remote(static_cast<pid_t>(pid), direction, copy, deadline_ns);
  return {result.bytes_done, result.error};
}

std::pair<uint64_t, int> read_process(int64_t pid, const at::Tensor& local_bases,
                                      const at::Tensor& remote_bases, const at::Tensor& runs,
                                      int64_t deadline_ns) {
  return move_bytes(Direction::kRead, pid, local_bases, remote_bases, runs, deadline_ns);
}

std::pair<uint64_t, int> write_process(int64_t pid, const at::Tensor& local_bases,
                                       const at::Tensor& remote_bases, const at::Tensor& runs,
                                       int64_t deadline_ns) {
  return move_bytes(Direction::kWrite, pid, local_bases, remote_bases, runs, deadline_ns);
}

uint64_t* word_at(uint64_t address) {
  TORCH_CHECK_VALUE(address != 0 && address % sizeof(uint64_t) == 0, "address ", address,
                    " is not that of a 64-bit word");
  return reinterpret_cast<uint64_t*>(address);
}

}  // namespace

void bind_transfer(py::module_& m) {
  const auto no_gil = py::call_guard<py::gil_scoped_release>();
  py::class_<PeerMapping, std::shared_ptr<PeerMapping>>(
      m, "PeerMapping", "A peer's shareable region, mapped into this process.")
      .def_static("open", &PeerMapping::open, py::arg("pid"), py::arg("fd"), py::arg("inode"),
                  py::arg("device"), py::arg("nbytes"), no_gil)
      .def_property_readonly(
          "address",
          [](const PeerMapping& mapping) { return reinterpret_cast<uintptr_t>(mapping.data()); },
          "Where the region starts here; 0 once closed.")
      .def_property_readonly("nbytes", &PeerMapping::nbytes)
      .def("close", &PeerMapping::close, no_gil,
           "Unmaps; idempotent. No copy may be under way in the mapping.");

  m.def("read_process", &read_process, py::arg("pid"), py::arg("local_bases"),
        py::arg("remote_bases"), py::arg("runs"), py::arg("deadline_ns") = 0, no_gil,
        "(bytes_done, errno) of copying runs out of another process's memory.");
  m.def("write_process", &write_process, py::arg("pid"), py::arg("local_bases"),
        py::arg("remote_bases"), py::arg("runs"), py::arg("deadline_ns") = 0, no_gil,
        "(bytes_done, errno) of copying runs into another process's memory.");
  m.def(
      "load_word", [](uint64_t address) { return load_word(word_at(address)); }, py::arg("address"),
      "The counter at a mapped address, ordered after what was read before.");
  m.def(
      "bump_word", [](uint64_t address) { return bump_word(word_at(address)); }, py::arg("address"),
      "Adds 1 to the counter at a mapped address, before anything that is written after.");
}

}  // namespace llmdd
