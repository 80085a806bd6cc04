// SPDX-License-Identifier: Apache-2.0
#pragma once

namespace sim {

// Sets the thread's error text and returns the code, for `return fail(...)`.
int fail(int code, const char* format, ...) __attribute__((format(printf, 2, 3)));

}  // namespace sim
