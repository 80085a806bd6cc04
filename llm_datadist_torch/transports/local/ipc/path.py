# SPDX-License-Identifier: Apache-2.0
"""The path to device memory of a process on this host: imported once, then copied on a stream."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import msgspec
import torch

from llm_datadist_torch import _C
from llm_datadist_torch.memory import device_copies
from llm_datadist_torch.transports.base import Movement, PathUnavailable, Relay
from llm_datadist_torch.transports.local.copies import check_after, check_before, copy_here
from llm_datadist_torch.transports.local.ipc import messages
from llm_datadist_torch.transports.local.ipc.imports import IMPORTS
from llm_datadist_torch.transports.local.ipc.runtime import ipc_runtime
from llm_datadist_torch.transports.local.mappings import PeerMappings
from llm_datadist_torch.transports.local.relayed import LocalPath
from llm_datadist_torch.values.deadline import Deadline
from llm_datadist_torch.values.status import LLMException

logger = logging.getLogger("llm_datadist_torch")

_TRANSPORT = "local"
_MAX_REFUSED = 1024
"""Caches whose owner has refused keys; of those that were refused before, it is asked again."""


@dataclass(eq=False)
class _OpenMemory:
    """One allocation of the peer's that is open here, as it was told once.

    Attributes:
        shared: What the peer said of it.
        address: Where it is here.
        counters: Keeps the counter mapped by which the peer is told that it has been closed.
        closed: Its address.
        users: Movements under way.
        ending: No more movement begins; it is closed with the last of them.
    """

    shared: messages.SharedMemory
    address: int
    counters: _C.PeerMapping
    closed: int
    users: int = 0
    ending: bool = False


class _Table:
    """What is open, by the peer's addresses; never changed."""

    def __init__(self, memory: list[_OpenMemory]) -> None:
        self.memory = sorted(memory, key=lambda one: one.shared.start)
        starts = [one.shared.start for one in self.memory]
        self._starts = torch.tensor(starts, dtype=torch.int64)
        self._ends = self._starts + torch.tensor(
            [one.shared.nbytes for one in self.memory], dtype=torch.int64
        )
        self._here = torch.tensor([one.address for one in self.memory], dtype=torch.int64)

    def find(self, addrs: torch.Tensor, extent: int) -> tuple[torch.Tensor, list[int]] | None:
        """The addresses here, and which memory they are in; None if some are in none."""
        at = torch.searchsorted(self._starts, addrs, right=True) - 1
        if not self.memory or int(at.min()) < 0 or bool((addrs + extent > self._ends[at]).any()):
            return None
        return addrs - self._starts[at] + self._here[at], sorted(set(at.tolist()))


class DeviceIpc(LocalPath):
    """The peer's device memory, opened by keys that its owner gives out.

    A key is asked for with the first movement that needs it, and closed when the owner ends the
    memory, or with the link; movements under way finish first.

    Args:
        relay: The control connection.
        mappings: Reach counters of the peer's.
        device: The NPU that copies.
    """

    name = "device-ipc"

    def __init__(self, relay: Relay, mappings: PeerMappings, device: torch.device) -> None:
        self._relay = relay
        self._mappings = mappings
        self._device = device
        self._lock = threading.Lock()
        self._open: dict[messages.SharedMemory, _OpenMemory] = {}
        self._table = _Table([])
        self._refused: dict[int, str] = {}
        self._asking = 0
        self._ended: set[messages.SharedMemory] = set()
        self._closed = False

    def move(self, movement: Movement, deadline: Deadline) -> None:
        """Copy on a stream of this library's, batched and merged as within one process."""
        with self._using(movement, deadline) as remote_addrs:
            check_before(movement, self._mappings)
            copy_here(movement, remote_addrs, self._device, deadline)
            check_after(movement, self._mappings)

    @contextmanager
    def _using(self, movement: Movement, deadline: Deadline) -> Iterator[torch.Tensor]:
        """The addresses here of the peer's memory, which stays open meanwhile."""
        found = self._take(movement)
        if found is None:
            self._request_keys(movement, deadline)
            found = self._take(movement)
        if found is None:
            raise PathUnavailable("the link has ended, or the peer has ended this memory")
        addrs, memory = found
        try:
            yield addrs
        finally:
            with self._lock:
                for one in memory:
                    one.users -= 1
                done = any(one.ending and not one.users for one in memory)
                unused = self._take_unused() if done else []
            self._release(unused)

    def _take(self, movement: Movement) -> tuple[torch.Tensor, list[_OpenMemory]] | None:
        with self._lock:
            table = self._table
            found = table.find(movement.remote_addrs, movement.remote_extent)
            if found is None:
                return None
            memory = [table.memory[at] for at in found[1]]
            for one in memory:
                one.users += 1
        return found[0], memory

    # -- opening ----------------------------------------------------------------------------------

    def _request_keys(self, movement: Movement, deadline: Deadline) -> None:
        """Ask the owner for keys, and open them.

        Raises:
            PathUnavailable: They can't be had.
        """
        reason = self._refused.get(movement.cache_id)
        if reason is not None:
            raise PathUnavailable(reason)
        with device_copies.current_device(self._device):
            wanted = messages.Wanted(ipc_runtime().us)
        with self._answer_expected():
            answer = self._relay.call(movement, _TRANSPORT, messages.encode(wanted), deadline)
            try:
                shown = messages.decode(answer, messages.Shown)
                for shared in shown.memory:
                    self._open_one(shared)
            except (OSError, LLMException, msgspec.DecodeError) as error:
                shown = messages.Shown([], f"opening it failed: {error}")
        if shown.reason:
            self._refuse(movement.cache_id, shown.reason)
            raise PathUnavailable(shown.reason)

    @contextmanager
    def _answer_expected(self) -> Iterator[None]:
        """What the owner ends meanwhile may be in an answer that comes later."""
        with self._lock:
            self._asking += 1
        try:
            yield
        finally:
            with self._lock:
                self._asking -= 1
                if not self._asking:
                    self._ended.clear()

    def _refuse(self, cache_id: int, reason: str) -> None:
        with self._lock:
            is_new = reason not in self._refused.values()
            self._refused[cache_id] = reason
            while len(self._refused) > _MAX_REFUSED:
                del self._refused[next(iter(self._refused))]
        if is_new:
            logger.warning("a peer's device memory can't go by %s: %s", self.name, reason)

    def _open_one(self, shared: messages.SharedMemory) -> None:
        """Open memory, unless it has been, or its end was told before.

        Raises:
            OSError: The counter of it can't be mapped.
            LLMDeviceError: The runtime refuses.
        """
        counters, closed = self._mappings.counters(shared.closed)
        with self._lock:
            if shared in self._open:
                return
            if self._closed or shared in self._ended:
                self._say_closed(shared, closed)
                return
            try:
                address = IMPORTS.open(shared.key, self._device)
            except BaseException:
                self._say_closed(shared, closed)
                raise
            # A key is told anew only to who is to close what it has opened by it before.
            for one in self._open.values():
                one.ending |= one.shared.key == shared.key
            self._open[shared] = _OpenMemory(shared, address, counters, closed)
            unused = self._take_unused()
        self._release(unused)

    # -- closing ----------------------------------------------------------------------------------

    def end(self, ended: messages.Ended) -> None:
        """The owner wants to free memory. Does not block."""
        for shared in ended.memory:
            with self._lock:
                one = self._open.get(shared)
                if one is not None:
                    one.ending = True
                else:
                    if self._asking:
                        self._ended.add(shared)
                    with suppress(OSError):
                        _counters, closed = self._mappings.counters(shared.closed)
                        self._say_closed(shared, closed)
                unused = self._take_unused()
            self._release(unused)

    def _take_unused(self) -> list[_OpenMemory]:
        """Out of the table what is ending, and out of everything what of that is unused."""
        unused = [one for one in self._open.values() if one.ending and not one.users]
        for one in unused:
            del self._open[one.shared]
        self._table = _Table([one for one in self._open.values() if not one.ending])
        return unused

    def _release(self, unused: list[_OpenMemory]) -> None:
        for one in unused:
            try:
                IMPORTS.close(one.shared.key, self._device)
            except RuntimeError as error:  # of torch_npu's, too: it may be ending
                logger.warning("closing device memory of a peer: %s", error)
            with self._lock:
                self._say_closed(one.shared, one.closed)

    def _say_closed(self, shared: messages.SharedMemory, closed: int) -> None:
        """Increment its counter, with the lock held, and unmap the counters if none is needed."""
        _C.bump_word(closed)
        region_id = shared.closed.region.region_id
        if all(region_id != one.closed.region.region_id for one in self._open):
            self._mappings.forget(region_id)

    def close(self) -> None:
        """Close everything that no movement uses; the others close the rest."""
        with self._lock:
            self._closed = True
            for one in self._open.values():
                one.ending = True
            unused = self._take_unused()
        self._release(unused)

    @property
    def open_bytes(self) -> int:
        """Bytes of the peer's device memory that are open here."""
        with self._lock:
            return sum(one.shared.nbytes for one in self._open.values())
