# SPDX-License-Identifier: Apache-2.0
"""Peers that may still write after their connection has ended: their leases stay."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from llm_datadist_torch.net.loop import READ, Loop
from llm_datadist_torch.net.process import PeerProcess
from llm_datadist_torch.serving.peer import Grant, ServedPeer

logger = logging.getLogger("llm_datadist_torch")

_LOOK_S = 0.25
"""How often a process without a pidfd is checked for being alive."""


@dataclass(eq=False)
class LateWriter:
    """The write leases of one connection that has ended.

    Attributes:
        peer: Cluster id of the writer.
        epoch: Its life.
        process: Its process, which is on this host and lives.
        grants: Its write leases.
    """

    peer: int
    epoch: str
    process: PeerProcess
    grants: dict[int, Grant] = field(default_factory=dict)


class LateWriters:
    """Write leases of peers whose connection has ended.

    The end of a connection is not the end of a peer on this host: a push through a shared mapping
    goes on without it. So a write lease ends when the writer gives it back, on a later link if need
    be, or when its process is gone. Until then the memory is not given to anybody else.

    Thread safety: ``release`` and the properties may be called from any thread, the rest belongs to
    the I/O thread.

    Args:
        loop: The I/O thread.
        end: Ends leases.
    """

    def __init__(self, loop: Loop, end: Callable[[dict[int, Grant]], None]) -> None:
        self._loop, self._end = loop, end
        self._lock = threading.Lock()
        self._writers: dict[str, LateWriter] = {}

    def retain(self, link: ServedPeer) -> None:
        """The connection of a link has ended: keep the write leases of a peer that lives."""
        process = link.connection.process
        if process is None or process.is_this_one or not process.alive:
            return
        numbers = [number for number, grant in list(link.grants.items()) if grant.write]
        taken = {number: link.grants.pop(number, None) for number in numbers}
        grants = {number: grant for number, grant in taken.items() if grant is not None}
        if not grants:
            return
        link.connection.take_process()
        writer = LateWriter(link.peer, link.epoch, process, grants)
        with self._lock:
            self._writers[link.name] = writer
        logger.warning(
            "cluster %d has lost its connection, but may still write to %d cache(s): their memory"
            " is not reused until it reports that it has stopped, or process %d ends",
            link.peer,
            len({id(grant.entry) for grant in grants.values()}),
            process.pid,
        )
        if process.fileno() >= 0:
            self._loop.add(process.fileno(), READ, lambda _: self._gone(link.name))
        else:
            self._look_later()

    def release(self, epoch: str, name: str, lease_id: int) -> None:
        """The writer gives back a lease that it had on an earlier link."""
        with self._lock:
            writer = self._writers.get(name)
            if writer is None or writer.epoch != epoch:
                return
            grant = writer.grants.pop(lease_id, None)
            done = not writer.grants
        if grant is not None:
            self._end({lease_id: grant})
        if done:
            self._loop.run(lambda: self._gone(name))

    def keep_only(self, epoch: str, earlier: Mapping[str, Sequence[int]]) -> None:
        """A writer says which leases it still uses, per earlier link; the others end."""
        for name, in_use in earlier.items():
            with self._lock:
                writer = self._writers.get(name)
                known = writer is not None and writer.epoch == epoch
                numbers = list(writer.grants) if writer is not None and known else []
            for number in set(numbers).difference(in_use):
                self.release(epoch, name, number)

    @property
    def leases(self) -> int:
        """How many write leases are kept."""
        with self._lock:
            return sum(len(writer.grants) for writer in self._writers.values())

    @property
    def grants(self) -> list[Grant]:
        """The write leases that are kept."""
        with self._lock:
            return [grant for each in self._writers.values() for grant in each.grants.values()]

    def close(self) -> None:
        """Watch nobody any more, and end all leases."""
        for name in list(self._writers):
            self._gone(name)

    def _gone(self, name: str) -> None:
        with self._lock:
            writer = self._writers.pop(name, None)
        if writer is not None:
            self._loop.remove(writer.process.fileno())
            self._end(writer.grants)

    def _look_later(self) -> None:
        self._loop.timers.set(self._look, [time.monotonic() + _LOOK_S])

    def _look(self) -> None:
        watched = [(name, each) for name, each in list(self._writers.items())
                   if each.process.fileno() < 0]  # fmt: skip
        for name, writer in watched:
            if not writer.process.alive:
                self._gone(name)
        if watched:
            self._look_later()
