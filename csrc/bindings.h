// SPDX-License-Identifier: Apache-2.0
// The parts that llm_datadist_torch._C is put together from, one function per bind_*.cpp.

#pragma once

#include <pybind11/pybind11.h>

namespace llmdd {

void bind_copy(pybind11::module_& m);      // block_runs, copy_runs
void bind_device(pybind11::module_& m);    // copy_runs_on_device, errors of AscendCL
void bind_memory(pybind11::module_& m);    // HostRegion, Arena, probes
void bind_transfer(pybind11::module_& m);  // PeerMapping, read_process, write_process

}  // namespace llmdd
