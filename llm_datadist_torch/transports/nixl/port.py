# SPDX-License-Identifier: Apache-2.0
"""An agent that is started when it is needed and ended to stop its transfers."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch

from llm_datadist_torch import _C
from llm_datadist_torch.transports.base import MemorySpan
from llm_datadist_torch.transports.nixl.engine import Agent
from llm_datadist_torch.values.status import LLMException

if TYPE_CHECKING:
    import numpy as np

CHUNK_BYTES = 4 << 20
"""Bytes of one request of NIXL's.

Where UCX copies by the processor, posting a request is all of its copying, which nothing interrupts
(findings/nixl_post_is_the_copy.sh): a millisecond here.
"""
CHUNK_RUNS = 1024
"""Descriptors of one request."""
_WINDOW = 4
"""Requests under way."""
_SHORTEST_NAP_S, _LONGEST_NAP_S = 20e-6, 100e-6


class Port:
    """One direction of one link: an agent, the memory registered with it, the peer that it knows.

    Thread safety: one movement at a time; :meth:`drop` and :meth:`abandon` may come from any
    thread, and :meth:`abandon` from within a movement.

    Args:
        receives: As of :class:`Agent`.
    """

    def __init__(self, *, receives: bool) -> None:
        self._receives = receives
        self._lock = threading.Lock()
        self._agent: Agent | None = None
        self._held: dict[MemorySpan, object] = {}
        self._peer: tuple[str, bytes] | None = None
        self._ticket: tuple[list[MemorySpan], bytes] | None = None

    def register(self, spans: Iterable[MemorySpan]) -> None:
        """Have spans registered; starts the agent. Blocks for some 30 ms then, 500 the first time.

        Raises:
            LLMException: NIXL refused.
        """
        with self._lock:
            if self._agent is None:
                self._agent = Agent(receives=self._receives)
            for span in spans:
                if span not in self._held:
                    for other in [old for old in self._held if _overlap(old, span)]:
                        self._agent.deregister(self._held.pop(other))
                    self._held[span] = self._agent.register(_table([span]))
                    self._ticket = None

    def ticket(self, spans: list[MemorySpan]) -> bytes:
        """What the peer must load to write to spans that are held."""
        with self._lock:
            if self._ticket is None or self._ticket[0] != spans:
                self._ticket = (spans, self._started().describe(_table(spans)))
            return self._ticket[1]

    def drop(self, span: MemorySpan) -> None:
        """The span is about to be freed."""
        with self._lock:
            memory = self._held.pop(span, None)
            if memory is not None:
                self._started().deregister(memory)

    def abandon(self) -> None:
        """End the agent: nothing that it has begun goes on, here or at the peer. Idempotent."""
        with self._lock:
            agent, self._agent = self._agent, None
            self._held.clear()
            self._peer = self._ticket = None
            if agent is not None:
                agent.close()

    def write(self, ticket: bytes, runs: torch.Tensor, check: Callable[[], None]) -> None:
        """Write held memory to the memory of a peer; blocks until all of it is there.

        Args:
            ticket: The peer's.
            runs: int64 [3, n]: addresses here, addresses there, bytes.
            check: Called between polls; raises to give up.

        Raises:
            LLMException: What ``check`` raised, or NIXL's error. The port has been abandoned.
        """
        try:
            with self._lock:
                agent = self._started()
                peer = self._known(agent, ticket)
            under_way: deque[int] = deque()
            for local, remote in _requests(runs):
                if len(under_way) == _WINDOW:
                    _finish(agent, under_way.popleft(), check)
                handle, done = agent.write(local, remote, peer)
                if done:
                    agent.release(handle)
                else:
                    under_way.append(handle)
                check()
            while under_way:
                _finish(agent, under_way.popleft(), check)
        except BaseException:
            # Whatever it was (Ctrl-C too): nothing goes on when we are gone.
            self.abandon()
            raise

    # -- with the lock held -----------------------------------------------------------------------

    def _started(self) -> Agent:
        if self._agent is None:
            raise LLMException("the NIXL agent has been ended")
        return self._agent

    def _known(self, agent: Agent, ticket: bytes) -> str:
        """The name of the peer's agent, which knows what the ticket says."""
        if self._peer is not None and self._peer[1] == ticket:
            return self._peer[0]
        if self._peer is not None:
            # What was registered at the same address before would be mixed up with it.
            agent.forget(self._peer[0])
            self._peer = None
        self._peer = (agent.load(ticket), ticket)
        return self._peer[0]


def _overlap(one: MemorySpan, other: MemorySpan) -> bool:
    return one.address < other.address + other.nbytes and other.address < one.address + one.nbytes


def _table(spans: Iterable[MemorySpan]) -> np.ndarray[Any, Any]:
    rows = torch.tensor([[span.address, span.nbytes, 0] for span in spans], dtype=torch.int64)
    return rows.numpy().view("uint64")


def _finish(agent: Agent, handle: int, check: Callable[[], None]) -> None:
    nap_s = _SHORTEST_NAP_S
    while not agent.poll(handle):
        check()
        time.sleep(nap_s)
        nap_s = min(nap_s * 2, _LONGEST_NAP_S)
    agent.release(handle)
    check()


def _requests(runs: torch.Tensor) -> Iterator[tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]]:
    """Tables of requests: runs cut to CHUNK_BYTES, taken together up to it and CHUNK_RUNS."""
    cursor = (0, 0)
    while cursor[0] < runs.shape[1]:
        local, remote, cursor = _C.engine_request(runs, cursor, CHUNK_BYTES, CHUNK_RUNS)
        yield local.numpy().view("uint64"), remote.numpy().view("uint64")
