# SPDX-License-Identifier: Apache-2.0
"""Strangers, in a process of their own: crowds of connections that do nothing good."""

from __future__ import annotations

import resource
import select
import socket
import sys
import time

from llm_datadist_torch.net.framing import WIRE_VERSION, Preamble
from llm_datadist_torch.values.version import VERSION

GREETING = Preamble(False, f"{VERSION}/{WIRE_VERSION}").encode()
"""What each side of a connection says first, where it has no secret."""

SAID = {
    "nothing": b"",
    "half a greeting": GREETING[:10],
    "a greeting": GREETING,
    "half a frame": GREETING + b"\0\x10\0\0\xff\xff\xff\xffhalf",
    "garbage": b"\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03" * 20,
}


def crowd(port: int, count: int, wave: int, said: bytes) -> int:
    """So many connections, in waves; each wave stays until the next has come.

    Returns:
        How many could be made.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    wave = min(wave, (hard - 100) // 2)
    made, before = 0, []
    for start in range(0, count, wave):
        now = []
        for _ in range(min(wave, count - start)):
            it = socket.socket()
            it.setblocking(False)
            it.connect_ex(("127.0.0.1", port))
            now.append(it)
        # TCP tries again 1 and 3 seconds after a connection that was dropped, for being too many.
        end = time.monotonic() + 4.0
        poller = select.poll()
        for it in now:
            poller.register(it, select.POLLOUT)
        waiting = {it.fileno(): it for it in now}
        while waiting and time.monotonic() < end:
            for number, _ in poller.poll(100):
                poller.unregister(number)
                it = waiting.pop(number)
                try:
                    it.send(said)
                    made += 1
                except OSError:
                    pass
        for it in before:
            it.close()
        before = now
    print(made, flush=True)
    # They stay until they are no longer wanted.
    sys.stdin.read()
    return made


if __name__ == "__main__":
    crowd(*map(int, sys.argv[1:4]), SAID[sys.argv[4]])
