// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <vector>

#include "acl/acl.h"

namespace sim {

// One contiguous copy, by the program's addresses.
struct Copy {
  void* dst;
  const void* src;
  size_t count;
};

// Whether it may be made: it fits `limit`, its memory is allocated, and is where `kind` says.
// Returns an aclError.
int check(const Copy& copy, size_t limit, aclrtMemcpyKind kind);

// The same for a stream, where host to host is refused.
int check_async(const Copy& copy, size_t limit, aclrtMemcpyKind kind);

// True if one side is host memory that isn't pinned.
bool touches_pageable(const Copy& copy);

// Makes the copies. Memory that has gone meanwhile is an error, never a crash. Returns an aclError.
int run(const std::vector<Copy>& copies);

}  // namespace sim
