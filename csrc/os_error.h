// SPDX-License-Identifier: Apache-2.0
// A failed system call, with its errno; Python sees it as the OSError subclass of that errno.

#pragma once

#include <stdexcept>
#include <string>

namespace llmdd {

class OsError : public std::runtime_error {
 public:
  OsError(int code, const std::string& what) : std::runtime_error(what), code_(code) {}
  int code() const { return code_; }

 private:
  int code_;
};

}  // namespace llmdd
