#!/usr/bin/env bash
# A transfer that runs from one registered span into the next, adjacent one is refused by NIXL and by Mooncake.
#
# Versions: nixl-cu12 1.5.1 with its own UCX; mooncake-transfer-engine-non-cuda 0.3.13.post1, protocol tcp.
# Expect:   what counts is that every byte is registered. Blocks that are adjacent in memory at both ends may be merged into
#           one descriptor, which is the usual way to make transfers of small blocks fast.
# Happens:  one descriptor over two adjacent registrations: NIXL raises NIXL_ERR_NOT_FOUND when the request is made, Mooncake
#           returns -1 from the transfer. The same bytes in two descriptors, cut where the registrations meet, arrive.
# Matters:  layers that are cut from one pool and registered one by one meet like this. Merge within a registration only, or
#           register the pool.
. "$(dirname "$0")/_common.sh"
install_mooncake

cat >"$dir/seen" <<'SEEN'
NIXL, one descriptor: nixlNotFoundError: NIXL_ERR_NOT_FOUND
NIXL, two descriptors: DONE, all bytes have arrived: True
Mooncake, one descriptor: -1
Mooncake, two descriptors: 0, all bytes have arrived: True
SEEN

show "$dir/seen" <<'PYTHON'
import numpy as np
from mooncake.engine import TransferEngine
from nixl_cu12._api import nixl_agent, nixl_agent_config

HALF = 1 << 20
source, destination = np.ones(2 * HALF, np.uint8), np.zeros(2 * HALF, np.uint8)
theirs = destination.ctypes.data
whole, halves = [(0, 2 * HALF)], [(0, HALF), (HALF, HALF)]
ways = {"one descriptor": whole, "two descriptors": halves}


def nixl():
    writer, owner = (nixl_agent(name, nixl_agent_config(enable_prog_thread=False)) for name in ("writer", "owner"))
    writer.register_memory([(source.ctypes.data, 2 * HALF, 0, "")], "DRAM")
    owner.register_memory([(theirs + offset, nbytes, 0, "") for offset, nbytes in halves], "DRAM")
    writer.add_remote_agent(owner.get_agent_metadata())

    def write(pieces):
        lists = (
            writer.get_xfer_descs([(memory.ctypes.data + offset, nbytes, 0) for offset, nbytes in pieces], "DRAM")
            for memory in (source, destination)
        )
        try:
            request = writer.initialize_xfer("WRITE", *lists, "owner")
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        state = writer.transfer(request)
        while state == "PROC":
            state = writer.check_xfer_state(request)
            owner.get_new_notifs()
        return state

    return write


def mooncake():
    writer, owner = TransferEngine(), TransferEngine()
    for engine in (writer, owner):
        assert engine.initialize("127.0.0.1", "P2PHANDSHAKE", "tcp", "") == 0
    assert writer.register_memory(source.ctypes.data, 2 * HALF) == 0
    for offset, nbytes in halves:
        assert owner.register_memory(theirs + offset, nbytes) == 0

    def write(pieces):
        peer = f"127.0.0.1:{owner.get_rpc_port()}"
        offsets, sizes = zip(*pieces)
        addresses = ([memory.ctypes.data + offset for offset in offsets] for memory in (source, destination))
        return writer.batch_transfer_sync_write(peer, *addresses, list(sizes))

    return write


for name, connect in (("NIXL", nixl), ("Mooncake", mooncake)):
    write = connect()
    for way, pieces in ways.items():
        destination[:] = 0
        result = write(pieces)
        arrived = f", all bytes have arrived: {bool(destination.all())}" if result in ("DONE", 0) else ""
        print(f"{name}, {way}: {result}{arrived}")
PYTHON
