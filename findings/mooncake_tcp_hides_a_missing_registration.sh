#!/usr/bin/env bash
# Over TCP Mooncake reads from and writes to local memory that was never registered, and refuses only the peer's.
#
# Versions: mooncake-transfer-engine-non-cuda 0.3.13.post1, protocol tcp.
# Expect:   both ends of a transfer must be registered, as Mooncake's documentation says and its RDMA transport requires;
#           TCP, which one develops with, checks the same.
# Happens:  the local end may be any memory: write and read return 0, and the bytes are right. The remote end is
#           checked: -1.
# Matters:  the buffer that a program forgot to register is found on the first machine with RDMA, not by its tests.
. "$(dirname "$0")/_common.sh"
install_mooncake

cat >"$dir/seen" <<'SEEN'
write from unregistered memory: 0, bytes are right: True
read into unregistered memory: 0, bytes are right: True
write to the peer's unregistered memory: -1
SEEN

show "$dir/seen" <<'PYTHON'
import numpy as np
from mooncake.engine import TransferEngine

NBYTES = 1 << 20
here, there = TransferEngine(), TransferEngine()
for engine in (here, there):
    assert engine.initialize("127.0.0.1", "P2PHANDSHAKE", "tcp", "") == 0
peer = f"127.0.0.1:{there.get_rpc_port()}"
source, destination, back = np.full(NBYTES, 7, np.uint8), np.zeros(NBYTES, np.uint8), np.zeros(NBYTES, np.uint8)
assert there.register_memory(destination.ctypes.data, NBYTES) == 0

status = here.transfer_sync_write(peer, source.ctypes.data, destination.ctypes.data, NBYTES)
print(f"write from unregistered memory: {status}, bytes are right: {np.array_equal(source, destination)}")
status = here.transfer_sync_read(peer, back.ctypes.data, destination.ctypes.data, NBYTES)
print(f"read into unregistered memory: {status}, bytes are right: {np.array_equal(source, back)}")
print("write to the peer's unregistered memory:", here.transfer_sync_write(peer, source.ctypes.data, back.ctypes.data, NBYTES))
PYTHON
