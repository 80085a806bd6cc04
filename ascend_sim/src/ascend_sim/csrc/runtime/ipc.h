// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

namespace sim {

// The memory that starts at `start` is to be freed: ends its keys. Returns false if another process
// has one of them open.
bool end_exports(uintptr_t start);

}  // namespace sim
