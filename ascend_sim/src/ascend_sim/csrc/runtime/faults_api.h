// SPDX-License-Identifier: Apache-2.0
// Fault injection as Python drives it through ctypes.
#pragma once

#include "../sim_api.h"

// Adds faults, written as in ASCEND_SIM_FAULTS.
ASCEND_SIM_API void ascend_sim_faults_add(const char* faults);

// Forgets all faults. Counts go on.
ASCEND_SIM_API void ascend_sim_faults_reset(void);

// Writes "function=calls;..." with a NUL at the end if it fits. Returns the bytes that it takes.
ASCEND_SIM_API size_t ascend_sim_counts(char* out, size_t size);
