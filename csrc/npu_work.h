// SPDX-License-Identifier: Apache-2.0
// What copies on an NPU need of torch_npu, without its headers: device, stream, kind of copy.

#pragma once

#include <c10/core/Device.h>
#include <c10/core/DeviceGuard.h>

#include "acl_runtime.h"
#include "device_copy.h"

namespace llmdd {

// The NPU that does a copy between memory of two devices; ValueError if both are host memory, or if
// they are two NPUs.
c10::Device npu_of(c10::Device to, c10::Device from);

// One call's time on an NPU: while it lives, the NPU is the thread's current device.
class NpuWork {
 public:
  // AclMissing without torch_npu, AclError if the device can't be had.
  explicit NpuWork(c10::Device device);

  // The calling thread's current stream of the device, as AscendCL knows it. torch_npu launches its
  // kernels from a queue of its own; when this returns, what this thread gave it before is on the
  // stream, so that calls of AscendCL come after that. Takes the GIL for a moment.
  void* stream() const;

  CopyLane lane(c10::Device to, c10::Device from) const;

 private:
  c10::Device device_;
  c10::DeviceGuard guard_;
};

}  // namespace llmdd
