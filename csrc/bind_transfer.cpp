// SPDX-License-Identifier: Apache-2.0
// Python face of what transports need: mappings of another process's shareable regions, counters in
// them, process_vm_readv/writev, requests of engines, and the check of what a peer asks for. What
// may take long releases the GIL.

#include <torch/extension.h>

#include <algorithm>
#include <array>
#include <tuple>

#include "bindings.h"
#include "extents.h"
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

// Addresses wrap, as in memory.
int64_t offset_by(int64_t address, int64_t nbytes) {
  return static_cast<int64_t>(static_cast<uint64_t>(address) + static_cast<uint64_t>(nbytes));
}

// Where the next request of an engine begins: a run, and a byte of it.
using Cursor = std::pair<int64_t, int64_t>;

// One request at a time: a peer that asks for the same terabyte again and again must not make us
// write down all of it.
std::tuple<at::Tensor, at::Tensor, Cursor> engine_request(const at::Tensor& runs, Cursor from,
                                                          int64_t max_bytes, int64_t max_runs) {
  check_index_tensor(runs, "runs", 2);
  TORCH_CHECK_VALUE(runs.size(0) == 3, "runs must have 3 rows, not ", runs.size(0));
  TORCH_CHECK_VALUE(max_bytes > 0 && max_runs > 0, "max_bytes=", max_bytes,
                    " and max_runs=", max_runs, " must be positive");
  TORCH_CHECK_INDEX(from.first >= 0 && from.second >= 0, "there is no run ", from.first);
  const at::Tensor table = runs.contiguous();
  const int64_t count = table.size(1);
  const int64_t* local = table.const_data_ptr<int64_t>();
  const int64_t* remote = local + count;
  const int64_t* nbytes = remote + count;
  std::vector<std::array<int64_t, 3>> pieces;
  auto [run, done] = from;
  for (int64_t room = max_bytes; run < count && room > 0; done = 0, ++run) {
    TORCH_CHECK_VALUE(nbytes[run] > 0 && done < nbytes[run], "run ", run, " has no byte ", done);
    if (static_cast<int64_t>(pieces.size()) == max_runs) {
      break;
    }
    const int64_t size = std::min(nbytes[run] - done, room);
    pieces.push_back({offset_by(local[run], done), offset_by(remote[run], done), size});
    room -= size;
    if (done += size; done < nbytes[run]) {
      break;
    }
  }
  const int64_t rows = static_cast<int64_t>(pieces.size());
  at::Tensor here = at::zeros({rows, 3}, at::kLong);
  at::Tensor there = at::zeros({rows, 3}, at::kLong);
  for (int64_t i = 0; i < rows; ++i) {
    const auto& [mine, theirs, size] = pieces[static_cast<size_t>(i)];
    int64_t* row = here.mutable_data_ptr<int64_t>() + 3 * i;
    row[0] = mine;
    row[1] = size;
    row = there.mutable_data_ptr<int64_t>() + 3 * i;
    row[0] = theirs;
    row[1] = size;
  }
  return {here, there, {run, done}};
}

// -1 unless all stretches lie inside rows of the tensors.
int64_t bytes_in_rows(const at::Tensor& starts, const at::Tensor& sizes, const at::Tensor& bases,
                      int64_t extent, int64_t pitch, int64_t row_bytes) {
  check_index_tensor(starts, "starts", 1);
  check_index_tensor(sizes, "sizes", 1);
  check_index_tensor(bases, "bases", 1);
  TORCH_CHECK_VALUE(starts.size(0) == sizes.size(0), "starts has ", starts.size(0),
                    " entries, sizes ", sizes.size(0));
  TORCH_CHECK_VALUE(extent >= 0 && row_bytes > 0 && pitch >= row_bytes, "extent=", extent,
                    ", pitch=", pitch, ", row_bytes=", row_bytes, " describe no tensor");
  const at::Tensor first = starts.contiguous();
  const at::Tensor length = sizes.contiguous();
  const at::Tensor tensors = bases.contiguous();
  std::vector<uint64_t> sorted(as_addresses(tensors), as_addresses(tensors) + tensors.size(0));
  std::sort(sorted.begin(), sorted.end());
  return bytes_inside(sorted, {extent, pitch, row_bytes}, as_addresses(first),
                      length.const_data_ptr<int64_t>(), static_cast<size_t>(first.size(0)))
      .value_or(-1);
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
      "engine_request", &engine_request, py::arg("runs"), py::arg("start"), py::arg("max_bytes"),
      py::arg("max_runs"), no_gil,
      "The tables (address, nbytes, 0), int64 [n, 3], of either side, for a request that begins at "
      "start=(run, byte); and where the next one begins.");
  m.def("bytes_inside", &bytes_in_rows, py::arg("starts"), py::arg("sizes"), py::arg("bases"),
        py::arg("extent"), py::arg("pitch"), py::arg("row_bytes"), no_gil,
        "The bytes of all stretches, or -1 unless each has some and lies inside a row.");
  m.def(
      "load_word", [](uint64_t address) { return load_word(word_at(address)); }, py::arg("address"),
      "The counter at a mapped address, ordered after what was read before.");
  m.def(
      "bump_word", [](uint64_t address) { return bump_word(word_at(address)); }, py::arg("address"),
      "Adds 1 to the counter at a mapped address, before anything that is written after.");
}

}  // namespace llmdd
