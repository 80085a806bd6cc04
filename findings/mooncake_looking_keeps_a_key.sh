#!/usr/bin/env bash
# Asking Mooncake's store whether a key exists, or how large it is, keeps the key from being removed for seconds.
#
# Versions: mooncake-transfer-engine-non-cuda 0.3.13.post1, its master with its own settings.
# Expect:   a key that nobody is reading can be removed; is_exist and get_size change nothing.
# Happens:  each of them, like get, gives out a lease, here of 10 s, which every further look renews. Until it ends remove returns
#           -706, and remove_all leaves the key and does not count it, without an error. A key that nobody has looked at is
#           removed at once.
# Matters:  an instance that looks up prefixes all the time keeps them in memory against those who free them, for as long as it
#           looks; and remove_all, before weights are changed, leaves KV of the old ones. Look at the count, and try again.
. "$(dirname "$0")/_common.sh"
install_mooncake

cat >"$dir/seen" <<'SEEN'
remove of a key that nobody has looked at: 0
remove after get: -706
remove after is_exist: -706
remove after get_size: -706
remove_all: 1 of 4 keys
still there: ['get', 'get_size', 'is_exist']
remove once the lease has ended: 0
SEEN

show "$dir/seen" <<'PYTHON'
import pathlib
import socket
import subprocess
import time

import mooncake
from mooncake.store import MooncakeDistributedStore


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def until(condition, seconds):
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.2)


port = free_port()
program = pathlib.Path(mooncake.__file__).with_name("mooncake_master")
master = subprocess.Popen([program, f"--rpc_port={port}", f"--metrics_port={free_port()}"], stderr=subprocess.DEVNULL)


def listens():
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


try:
    until(listens, 30)
    store = MooncakeDistributedStore()
    assert store.setup("127.0.0.1", "P2PHANDSHAKE", 64 << 20, 16 << 20, "tcp", "", f"127.0.0.1:{port}") == 0
    looks = {"get": store.get, "is_exist": store.is_exist, "get_size": store.get_size}
    for key in ("first", "second", *looks):
        assert store.put(key, b"KV") == 0
    print("remove of a key that nobody has looked at:", store.remove("first"))
    for name, look in looks.items():
        look(name)
        print(f"remove after {name}: {store.remove(name)}")
    print("remove_all:", store.remove_all(), "of 4 keys")
    print("still there:", sorted(key for key in ("second", *looks) if store.is_exist(key)))
    start = time.monotonic()
    statuses = []
    until(lambda: statuses.append(store.remove("get")) or statuses[-1] == 0, 60)
    print("remove once the lease has ended:", statuses[-1])
    print(f"# after {time.monotonic() - start:.1f} s")
finally:
    master.kill()
    master.wait()
PYTHON
