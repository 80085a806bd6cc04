// SPDX-License-Identifier: Apache-2.0
// The parts that llm_datadist_torch._C is put together from, one function per bind_*.cpp.

#pragma once

#include "binding_class.h"

namespace llmdd {

void bind_build(Module& module);         // build_facts
void bind_copy(Module& module);          // block_runs, copy_runs
void bind_device(Module& module);        // copies on streams of AscendCL
void bind_memory(Module& module);        // HostRegion, Arena, probes
void bind_net(Module& module);           // StreamSocket
void bind_ops(Module& module);           // the plans of the copy ops
void bind_tensor_watch(Module& module);  // watch_tensors
void bind_transfer(Module& module);      // PeerMapping, read_process, write_process

}  // namespace llmdd
