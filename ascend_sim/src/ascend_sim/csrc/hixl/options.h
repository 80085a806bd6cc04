// SPDX-License-Identifier: Apache-2.0
// Options and engine names, from their texts.
#pragma once

#include <map>
#include <string>

#include "common.h"
#include "wire.h"

namespace ascend_sim::hixl {

// What an engine was told at Initialize.
struct Options {
  bool fabric_mem = false;     // all pieces of one transfer must be of one kind of memory
  bool staging = true;         // unregistered addresses are taken for host memory
  bool auto_connect = false;   // the first transfer connects, and dead links are dropped
  bool client_server = false;  // LocalCommRes of version 1.3: links without limit

  // Whether the engine behind it makes its links by HCCL communicators.
  bool is_hccl() const { return !fabric_mem && !client_server; }

  // Throws BadArgument.
  static Options parse(const std::map<std::string, std::string>& texts);
};

// Splits an engine's name, "ip:port" or "[ipv6]:port"; port 0 if the name has none.
// Throws BadArgument.
Address parse_engine(const std::string& name);

}  // namespace ascend_sim::hixl
