// SPDX-License-Identifier: Apache-2.0
// The Python types CacheGuard and Lease, on CPython's limited API.

#pragma once

#include "python.h"

namespace llmdd {

// Adds both types to a module. Returns -1 with a Python error set on failure.
int add_lease_guard(PyObject* module);

}  // namespace llmdd
