#!/usr/bin/env bash
# NIXL says that it has released a transfer that is under way, and the bytes of the transfer go on landing.
#
# Versions: nixl-cu12 1.5.1 with its own UCX, over TCP.
# Expect:   release_xfer_handle cancels the transfer, or raises an error because it can't; its documentation says so. When it
#           has returned without an error, the destination is nobody's but its owner's.
# Happens:  it returns without an error, and the destination is filled to its end.
# Matters:  a request runs into its timeout, or is aborted, and its blocks are given to another request: the old transfer
#           writes over them. Only the end of the local agent stops it.
. "$(dirname "$0")/_common.sh"
install_nixl

cat >"$dir/seen" <<'SEEN'
posted: PROC
before the release: not all bytes have landed
released without an error
in the end: all bytes have landed
SEEN

UCX_TLS=tcp show "$dir/seen" <<'PYTHON'
import time

from pair import Pair

NBYTES = 512 << 20
pair = Pair(NBYTES, progress=True)


def landed():
    return "all bytes have landed" if pair.destination[-1] and pair.destination.all() else "not all bytes have landed"


request = pair.request(pair.blocks(NBYTES))
print("posted:", pair.writer.transfer(request))
print("before the release:", landed())
pair.writer.release_xfer_handle(request)
print("released without an error")
print(f"# when it has returned, {pair.destination[:: 1 << 16].mean():.0%} have landed")
deadline = time.monotonic() + 30
while not pair.destination.all() and time.monotonic() < deadline:
    time.sleep(0.1)
print("in the end:", landed())
PYTHON
