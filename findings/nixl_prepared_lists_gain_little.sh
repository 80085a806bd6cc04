#!/usr/bin/env bash
# Preparing NIXL's descriptor lists once instead of making them for each transfer gains a few per cent within one host.
#
# Versions: nixl-cu12 1.5.1 with its own UCX.
# Expect:   as its documentation says, initialize_xfer repeats work that make_prepped_xfer does once: for thousands of
#           blocks prepared lists must be much faster.
# Happens:  making lists of 2048 blocks takes a few per cent of the time in which their 128 MiB are copied.
# Matters:  prepared lists must be kept right as caches come and go, at both ends. That work has to be paid for by something
#           else than the time of a transfer.
. "$(dirname "$0")/_common.sh"
install_nixl

cat >"$dir/seen" <<'SEEN'
making a request by lists of its own: less than a tenth of the transfer
making a request by prepared lists: less than a tenth of the transfer
SEEN

show "$dir/seen" <<'PYTHON'
import statistics
import time

import numpy as np
from pair import Pair

BLOCKS, NBYTES = 4096, 64 << 10
pair = Pair(BLOCKS * NBYTES)
here, there = pair.blocks(BLOCKS * NBYTES, of=NBYTES)
prepared = pair.writer.prep_xfer_dlist("", here, "DRAM"), pair.writer.prep_xfer_dlist("owner", there, "DRAM")
random = np.random.default_rng(0)


def by_lists(mine, theirs):
    return pair.request((here[mine], there[theirs]))


def by_prepared(mine, theirs):
    return pair.writer.make_prepped_xfer("WRITE", prepared[0], mine, prepared[1], theirs)


def timed(make):
    mine, theirs = (random.permutation(BLOCKS)[: BLOCKS // 2].astype(np.int32) for _ in range(2))
    start = time.perf_counter()
    request = make(mine, theirs)
    made = time.perf_counter()
    pair.run(request)
    return made - start, time.perf_counter() - made


kinds = {"lists of its own": by_lists, "prepared lists": by_prepared}
times = {name: [] for name in kinds}
for _ in range(15):
    for name, make in kinds.items():
        times[name].append(timed(make))
for name, pairs in times.items():
    making, moving = (1e3 * statistics.median(column) for column in zip(*pairs))
    print(f"making a request by {name}: {'less' if making < moving / 10 else 'more'} than a tenth of the transfer")
    print(f"# {making:.2f} ms to make, {moving:.1f} ms to move")
PYTHON
