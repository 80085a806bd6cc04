// SPDX-License-Identifier: Apache-2.0
// The handles of physical memory that aclrtMallocPhysical and imports give out.
#pragma once

#include "memory.h"

namespace sim {

void* add_handle(const PhysicalPtr& physical);
PhysicalPtr find_handle(void* handle);  // null if there is no such
bool drop_handle(void* handle);

}  // namespace sim
