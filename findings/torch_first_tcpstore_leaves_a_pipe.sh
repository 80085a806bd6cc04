#!/usr/bin/env bash
# The first TCPStore of a process leaves two descriptors behind, for as long as the process lives.
#
# Versions: torch 2.13.0, Linux.
# Expect:   when a store is deleted its descriptors are closed; or else every store leaks some.
# Happens:  the first leaves both ends of a pipe. All later ones leave nothing.
# Matters:  rendezvous of prefill and decode instances go by TCPStore. A test that counts descriptors around one link sees a
#           leak that is none; and who excuses two descriptors per store for it overlooks a real one. Make one store
#           before the count.
. "$(dirname "$0")/_common.sh"
install torch==2.13.0 numpy==2.4.6

cat >"$dir/seen" <<'SEEN'
store 1 leaves: pipe, pipe
store 2 leaves: nothing
store 3 leaves: nothing
SEEN

show "$dir/seen" <<'PYTHON'
import gc
import os

from torch.distributed import TCPStore


def descriptors():
    links = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            links[int(name)] = os.readlink(f"/proc/self/fd/{name}").partition(":")[0]
        except FileNotFoundError:  # the listing's own
            pass
    return links


for number in (1, 2, 3):
    before = descriptors()
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    store.set("key", "value")
    del store
    gc.collect()
    left = [what for number, what in descriptors().items() if number not in before]
    print(f"store {number} leaves: {', '.join(left) or 'nothing'}")
PYTHON
