#!/usr/bin/env bash
# Within one host, posting a NIXL transfer of any size returns when the bytes have been copied, with a progress thread, too.
#
# Versions: nixl-cu12 1.5.1 with its own UCX; Linux that lets a process copy from its peer's memory (process_vm_readv).
# Expect:   transfer() queues the request and returns PROC at once; its documentation keeps DONE for small transfers, and the progress
#           thread is there to move the bytes.
# Happens:  256 MiB, in one piece or in 4096 blocks, are DONE when transfer() returns: the calling thread has copied them. Over
#           TCP the same call returns PROC.
# Matters:  a scheduler that posts thousands of blocks between two steps stands still while they are copied, and only in the
#           deployment where both ends are on one host. Post from another thread, or in small requests.
. "$(dirname "$0")/_common.sh"
install_nixl

cat >"$dir/seen" <<'SEEN'
one host, 1 block: DONE when posted, all bytes have landed
one host, 4096 blocks: DONE when posted, all bytes have landed
tcp, 1 block: PROC when posted
tcp, 4096 blocks: PROC when posted
SEEN

show "$dir/seen" <<'PYTHON'
import os
import time

from pair import Pair

NBYTES = 256 << 20


def report(way):
    pair = Pair(NBYTES, progress=True)
    for blocks in (1, 4096):
        pair.destination[:] = 0
        here, there = pair.blocks(NBYTES, of=NBYTES // blocks)
        request = pair.request((here, there[::-1]))  # no two blocks are adjacent at both ends
        start = time.monotonic()
        state = pair.writer.transfer(request)
        print(f"# posting took {1e3 * (time.monotonic() - start):.1f} ms")
        landed = ", all bytes have landed" if state == "DONE" and pair.destination.all() else ""
        print(f"{way}, {blocks} block{'s' * (blocks > 1)}: {state} when posted{landed}")
        while state == "PROC":
            state = pair.writer.check_xfer_state(request)


report("one host")
os.environ["UCX_TLS"] = "tcp"
report("tcp")
PYTHON
