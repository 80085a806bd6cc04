// SPDX-License-Identifier: Apache-2.0

#include "npu_work.h"

#include <c10/util/Exception.h>
#include <pybind11/pybind11.h>

#include <cstdint>

namespace llmdd {
namespace {

// Asked for before the guard is made, which needs torch_npu.
c10::Device with_runtime(c10::Device device) {
  (void)acl_runtime();
  return device;
}

}  // namespace

c10::Device npu_of(c10::Device to, c10::Device from) {
  TORCH_CHECK_VALUE(!to.is_cpu() || !from.is_cpu(), "neither side is in device memory");
  TORCH_CHECK_VALUE(to == from || to.is_cpu() || from.is_cpu(), "dst is on ", to, ", but src on ",
                    from, ": one call works on one device");
  return to.is_cpu() ? from : to;
}

NpuWork::NpuWork(c10::Device device) : device_(device), guard_(with_runtime(device)) {
  acl_runtime().use_device(device.index());
}

void* NpuWork::stream() const {
  namespace py = pybind11;
  py::gil_scoped_acquire gil;
  const py::object torch = py::module_::import("torch");
  if (!py::hasattr(torch, "npu")) {
    throw AclMissing("torch_npu is not imported in this process");
  }
  // The getter of `npu_stream` waits, with the GIL released, until the queue is empty.
  const py::object stream =
      torch.attr("npu").attr("current_stream")(static_cast<int>(device_.index()));
  return reinterpret_cast<void*>(stream.attr("npu_stream").cast<uintptr_t>());
}

CopyLane NpuWork::lane(c10::Device to, c10::Device from) const {
  const CopyKind kind = to.is_cpu()     ? CopyKind::kDeviceToHost
                        : from.is_cpu() ? CopyKind::kHostToDevice
                                        : CopyKind::kDeviceToDevice;
  return {kind, stream()};
}

}  // namespace llmdd
