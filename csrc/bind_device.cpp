// SPDX-License-Identifier: Apache-2.0
// Python face of copies by address that involve device memory, and of AscendCL's errors.

#include <torch/csrc/utils/pybind.h>

#include <cstdint>
#include <exception>

#include "acl_runtime.h"
#include "bindings.h"
#include "device_copy.h"
#include "npu_work.h"
#include "tensor_args.h"

namespace llmdd {
namespace {

namespace py = pybind11;

int64_t copy_runs_on_device(const at::Tensor& dst_bases, const at::Tensor& src_bases,
                            const at::Tensor& runs, at::Device dst_device, at::Device src_device,
                            int64_t deadline_ns) {
  check_index_tensor(dst_bases, "dst_bases", 1);
  check_index_tensor(src_bases, "src_bases", 1);
  check_index_tensor(runs, "runs", 2);
  TORCH_CHECK_VALUE(runs.size(1) == 3, "runs must have 3 columns, not ", runs.size(1));
  TORCH_CHECK_VALUE(dst_bases.size(0) == src_bases.size(0), "dst_bases has ", dst_bases.size(0),
                    " addresses, but src_bases ", src_bases.size(0));
  const at::Tensor dst = dst_bases.contiguous();
  const at::Tensor src = src_bases.contiguous();
  const at::Tensor table = runs.contiguous();
  const bool between_devices =
      !dst_device.is_cpu() && !src_device.is_cpu() && dst_device != src_device;
  const NpuWork work(between_devices ? dst_device : npu_of(dst_device, src_device));
  if (between_devices) {
    // An error may only say that it is enabled already; a copy that lacks it fails by itself.
    (void)acl_runtime().enable_peer_access(src_device.index(), 0);
  }
  return copy_runs_on_lane({as_addresses(dst), as_addresses(src), static_cast<size_t>(dst.size(0))},
                           reinterpret_cast<const Run*>(table.const_data_ptr<int64_t>()),
                           static_cast<size_t>(table.size(0)), work.lane(dst_device, src_device),
                           deadline_ns);
}

// Errors of the ops pass through PyTorch, so the translator must be a global one; what they are in
// Python is decided there.
void raise_typed(std::exception_ptr pending) {
  const auto raise = [](const char* maker, auto... arguments) {
    const py::object error =
        py::module_::import("llm_datadist_torch.values.device_errors").attr(maker)(arguments...);
    PyErr_SetObject(reinterpret_cast<PyObject*>(Py_TYPE(error.ptr())), error.ptr());
  };
  try {
    if (pending) std::rethrow_exception(pending);
  } catch (const AclError& error) {
    raise("runtime_error", error.call(), error.code(), error.detail());
  } catch (const AclMissing& error) {
    raise("missing_runtime", error.what());
  }
}

}  // namespace

void bind_device(py::module_& m) {
  py::register_exception_translator(&raise_typed);
  m.def("copy_runs_on_device", &copy_runs_on_device, py::arg("dst_bases"), py::arg("src_bases"),
        py::arg("runs"), py::arg("dst_device"), py::arg("src_device"), py::arg("deadline_ns") = 0,
        py::call_guard<py::gil_scoped_release>(),
        "Copies by the device, on its current stream; done on return.");
}

}  // namespace llmdd
