// SPDX-License-Identifier: Apache-2.0
// Module definition of llm_datadist_torch._C. It knows neither torch's headers nor its libraries:
// tensors cross by DLPack (tensor_args.h), so one build serves every torch and every Python.

#include "bindings.h"

#include "py_lease_guard.h"

namespace {

constexpr const char* kDoc =
    "Native part of llm_datadist_torch: copies, host memory, transfers within one host.";

PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "_C", kDoc, -1, nullptr, nullptr, nullptr, nullptr, nullptr};

}  // namespace

extern "C" __attribute__((visibility("default"))) PyObject* PyInit__C() {
  PyObject* made = PyModule_Create(&definition);
  if (made == nullptr) return nullptr;
  try {
    llmdd::Module module(made);
    llmdd::bind_build(module);
    llmdd::bind_copy(module);
    llmdd::bind_device(module);
    llmdd::bind_memory(module);
    llmdd::bind_net(module);
    llmdd::bind_ops(module);
    llmdd::bind_transfer(module);
    llmdd::bind_tensor_watch(module);
    if (llmdd::add_lease_guard(made) != 0) throw llmdd::PythonError();
  } catch (...) {
    llmdd::detail::set_python_error();
    Py_DECREF(made);
    return nullptr;
  }
  return made;
}
