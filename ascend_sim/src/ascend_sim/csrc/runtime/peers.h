// SPDX-License-Identifier: Apache-2.0
// Whose memory a device of this process may reach, and what the process is called outside.
#pragma once

namespace sim {

// Lets `device` reach memory of `peer`.
void enable_peer(int device, int peer);

// Whether it may; a device always reaches its own.
bool is_peer_enabled(int device, int peer);

// What aclrtDeviceGetBareTgid says, by which exports know this process: never its own getpid().
int bare_tgid();

}  // namespace sim
