# SPDX-License-Identifier: Apache-2.0
"""Transfers: their pieces, and when they move.

An asynchronous transfer moves its bytes when the runtime's scheduler says so, never in step with
streams: whoever reuses memory before a transfer is complete sees wrong data. `inline` moves all at
once; `lazy` as late as possible, when the state is asked for a second time; `random` some when
submitted and some whenever the state is asked for, in any order. What nobody asks for moves too,
`PATIENCE_S` after it was submitted: there is no way to cancel.
"""

from __future__ import annotations

import itertools
import queue
import threading
import time
from collections.abc import Callable, Sequence

from ascend_sim.hixl import runtime
from ascend_sim.hixl.constants import MAX_REQUESTS
from ascend_sim.hixl.links import Link
from ascend_sim.hixl.types import (
    GetTransferStatusArgs,
    TransferResult,
    TransferStatus,
)
from ascend_sim.hixl.wire import Deadline

PATIENCE_S = 1.0
# Each step needs the GIL a dozen times, for which it waits 5 ms each time while some other thread
# computes: a large transfer has larger steps, not more of them.
_SMALLEST_STEP_BYTES = 256 << 10
_STEPS_BY_SIZE = 32
_STEP_PIECES = 256

LocalAlias = Callable[[int, int], int | None]
"""Where local bytes are read and written now, None if they may not be."""


def _steps(pieces: Sequence[runtime.Piece]) -> list[list[runtime.Piece]]:
    """Cuts a transfer into steps of limited size; the last is to be done first."""
    total = sum(length for _, _, length in pieces)
    step_bytes = max(_SMALLEST_STEP_BYTES, -(-total // _STEPS_BY_SIZE))
    steps: list[list[runtime.Piece]] = [[]]
    size = 0
    for local, remote, length in pieces:
        done = 0
        while done < length:
            if size == step_bytes or len(steps[-1]) == _STEP_PIECES:
                steps.append([])
                size = 0
            part = min(length - done, step_bytes - size)
            steps[-1].append((local + done, remote + done, part))
            done += part
            size += part
    return steps[::-1]


class Transfer:
    """The bytes of one call, and how far they are.

    Args:
        link: the link they move on.
        write: whether they go to the peer.
        pieces: what moves.
        local_alias: tells where local bytes are, when they move.
        user_data: given back with the result.
    """

    def __init__(
        self,
        link: Link,
        write: bool,
        pieces: Sequence[runtime.Piece],
        local_alias: LocalAlias,
        user_data: int = 0,
    ) -> None:
        self.link = link
        self.user_data = user_data
        self.status = TransferStatus.WAITING
        self.hangs = False
        self.polled = False
        self.due = time.monotonic() + PATIENCE_S
        self._write = write
        self._steps = _steps(pieces)
        self._local_alias = local_alias

    @property
    def waiting(self) -> bool:
        """Whether it is not over yet."""
        return self.status is TransferStatus.WAITING

    def fail(self) -> None:
        """It has failed; what has been moved stays."""
        self.status = TransferStatus.FAILED

    def advance(self, count: int | None = None, *, at_random: bool = False) -> None:
        """Moves some steps, or all that are left, unless it hangs."""
        while self.waiting and not self.hangs and (count is None or count > 0):
            self._step(at_random)
            count = None if count is None else count - 1

    def advance_at_random(self) -> None:
        """Moves any number of steps, in any order."""
        self.advance(runtime.random_below(len(self._steps) + 1), at_random=True)

    def finish(self, deadline: Deadline) -> bool:
        """Moves what is left, until the deadline; False if it passed."""
        while self.waiting and deadline.left():
            if self.hangs:
                self.link.closed.wait(deadline.left())
            if not self.hangs or self.link.closed.is_set():
                self._step(False)
        return not self.waiting

    def _step(self, at_random: bool) -> None:
        with self.link.moving:
            if not self.waiting:
                return
            if self.link.closed.is_set():
                self.fail()
                return
            if at_random:
                place = runtime.random_below(len(self._steps))
                self._steps[place], self._steps[-1] = self._steps[-1], self._steps[place]
            if not self._move(self._steps.pop()):
                self.fail()
            elif not self._steps:
                self.status = TransferStatus.COMPLETED

    def _move(self, step: list[runtime.Piece]) -> bool:
        aliased = []
        for local, remote, length in step:
            alias = self._local_alias(local, length)
            if alias is None:
                return False
            aliased.append((alias, remote, length))
        return self.link.move(self._write, aliased)


class Requests:
    """The asynchronous transfers of one engine that nobody knows the end of yet."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._transfers: dict[int, Transfer] = {}
        self._numbers = itertools.count(1)
        self._abandoned: queue.SimpleQueue[Transfer | None] = queue.SimpleQueue()
        self._ended = threading.Event()
        self._worker: threading.Thread | None = None

    def submit(self, transfer: Transfer) -> int | None:
        """Begins a transfer. Returns its number, None if there are too many under way."""
        with self._lock:
            if sum(other.waiting for other in self._transfers.values()) >= MAX_REQUESTS:
                return None
            number = next(self._numbers)
            self._transfers[number] = transfer
        scheduler = runtime.scheduler()
        if scheduler == "inline":
            transfer.advance()
        elif scheduler == "random":
            transfer.advance_at_random()
        self.abandon(transfer)
        return number

    def abandon(self, transfer: Transfer) -> None:
        """It goes on though nobody may ask for it: there is no way to cancel."""
        with self._lock:
            if not transfer.waiting or self._ended.is_set():
                return
            if self._worker is None:
                self._worker = threading.Thread(target=self._work, name="hixl", daemon=True)
                self._worker.start()
        self._abandoned.put(transfer)

    def poll(self, number: int) -> TransferStatus | None:
        """A transfer's state, None if there is no such request. One that is over is forgotten."""
        with self._lock:
            transfer = self._transfers.get(number)
        if transfer is None or transfer.link.closed.is_set():
            return None
        if runtime.scheduler() == "random":
            transfer.advance_at_random()
        elif transfer.polled:
            transfer.advance()
        transfer.polled = True
        if not transfer.waiting:
            with self._lock:
                self._transfers.pop(number, None)
        return transfer.status

    def poll_all(self, args: GetTransferStatusArgs) -> list[TransferResult]:
        """The states of all transfers, the oldest first."""
        with self._lock:
            transfers = list(self._transfers.items())
        results: list[TransferResult] = []
        for number, transfer in transfers:
            if len(results) == args.max_query_count:
                break
            status = self.poll(number)
            if status is None or (args.skip_waiting and status is TransferStatus.WAITING):
                continue
            results.append(TransferResult(number, transfer.user_data, status))
        return results

    def forget(self, link: Link) -> None:
        """A link was disconnected: nobody may ask for its transfers any more."""
        with self._lock:
            for number in [n for n, t in self._transfers.items() if t.link is link]:
                del self._transfers[number]

    def end(self) -> None:
        """The engine is being finalized; its links are closed."""
        self._ended.set()
        self._abandoned.put(None)

    def _work(self) -> None:
        while (transfer := self._abandoned.get()) is not None:
            while transfer.waiting and not self._ended.is_set():
                left = transfer.due - time.monotonic()
                if left <= 0:
                    transfer.advance()
                    break
                self._ended.wait(min(left, 0.05))
