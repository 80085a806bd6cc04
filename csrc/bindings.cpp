// SPDX-License-Identifier: Apache-2.0
// Module definition of llm_datadist_torch._C. What works on tensors alone is a torch op
// (schema.cpp); pybind11 is for what deals in addresses or owns a handle.

#include "bindings.h"

#include "py_lease_guard.h"

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native part of llm_datadist_torch: copies, host memory, transfers within one host.";
  llmdd::bind_copy(m);
  llmdd::bind_device(m);
  llmdd::bind_memory(m);
  llmdd::bind_transfer(m);
  if (llmdd::add_lease_guard(m.ptr()) != 0) throw pybind11::error_already_set();
}
