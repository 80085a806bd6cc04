# SPDX-License-Identifier: Apache-2.0
"""What a reader has open of a peer's device memory, in whatever order it is told, and what it says.

The owner frees memory once each counter that it gave out has changed: none may change too early,
and all must at last. Nothing is opened for real here: that needs an NPU.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch

from llm_datadist_torch import _C
from llm_datadist_torch.transports.base import (
    HOST_DEVICE,
    CacheVersion,
    Direction,
    Movement,
    PathUnavailable,
    RegionView,
)
from llm_datadist_torch.transports.local.host import HostIdentity
from llm_datadist_torch.transports.local.ipc import messages, path
from llm_datadist_torch.transports.local.mappings import PeerMappings
from llm_datadist_torch.values.deadline import Deadline

START, NBYTES = 1 << 46, 1 << 20


class FakeImports:
    """Counts, per key, how often it is open."""

    def __init__(self) -> None:
        self.open_keys: Counter[bytes] = Counter()

    def open(self, key: bytes, device: torch.device) -> int:
        self.open_keys[key] += 1
        return 1 << 40

    def close(self, key: bytes, device: torch.device) -> None:
        self.open_keys[key] -= 1
        assert self.open_keys[key] >= 0


class FakeRuntime:
    us = 7


class Pair:
    """A reader, and an owner that tells it what a test says."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.imports = FakeImports()
        monkeypatch.setattr(path, "IMPORTS", self.imports)
        monkeypatch.setattr(path, "ipc_runtime", FakeRuntime)
        monkeypatch.setattr(
            path.device_copies, "current_device", lambda _: contextlib.nullcontext()
        )
        monkeypatch.setattr(path, "copy_here", lambda *_: self.during())
        self._region = _C.HostRegion.create(4096, shareable=True)
        mappings = PeerMappings(HostIdentity.of_this_process(), trusted=True)
        self.reader = path.DeviceIpc(self, mappings, HOST_DEVICE)  # type: ignore[arg-type]
        self.mappings = mappings
        self.shown: list[messages.SharedMemory] = []
        self.before_answer: Callable[[], Any] = lambda: None
        self.during: Callable[[], Any] = lambda: None

    def key(self, number: int) -> messages.SharedMemory:
        """The one key that there is, with counter ``number``."""
        region = self._region
        view = RegionView(
            1, region.address, 4096, region.fd, region.inode, region.device, region.offset
        )
        return messages.SharedMemory(START, NBYTES, b"key", CacheVersion(view, 16 * number, 0, 0))

    def closed(self, number: int) -> bool:
        return bool(_C.load_word(self._region.address + 16 * number) != 0)

    def end(self, number: int) -> None:
        self.reader.end(messages.Ended([self.key(number)]))

    def move(self) -> None:
        address, runs = torch.tensor([START + 64]), torch.tensor([[0, 0, 8]])
        movement = Movement(Direction.WRITE, address, address, runs, None, 1)
        self.reader.move(movement, Deadline.after_ms(1000))

    def call(self, *_: Any) -> bytes:
        """As the relay: the owner answers with what the test says, once."""
        self.before_answer()
        shown, self.shown = self.shown, []
        return messages.encode(messages.Shown(shown))


@pytest.fixture
def pair(monkeypatch: pytest.MonkeyPatch) -> Pair:
    return Pair(monkeypatch)


def test_what_is_open_is_asked_for_once_and_closed_when_it_ends(pair: Pair) -> None:
    pair.shown = [pair.key(0)]
    pair.move()
    pair.move()
    assert (pair.imports.open_keys[b"key"], pair.closed(0)) == (1, False)
    assert pair.mappings.nbytes == 4096
    pair.end(0)
    assert (pair.imports.open_keys[b"key"], pair.closed(0)) == (0, True)
    assert pair.mappings.nbytes == pair.reader.open_bytes == 0


def test_a_movement_under_way_keeps_it_open(pair: Pair) -> None:
    seen = []

    def during() -> None:
        pair.end(0)
        seen.append((pair.imports.open_keys[b"key"], pair.closed(0)))

    pair.shown, pair.during = [pair.key(0)], during
    pair.move()
    assert seen == [(1, False)]
    assert (pair.imports.open_keys[b"key"], pair.closed(0)) == (0, True)


def test_an_end_that_comes_before_the_answer(pair: Pair) -> None:
    pair.shown, pair.before_answer = [pair.key(0)], lambda: pair.end(0)
    with pytest.raises(PathUnavailable):
        pair.move()
    assert (pair.imports.open_keys[b"key"], pair.closed(0)) == (0, True)
    assert not pair.reader._ended


@pytest.mark.parametrize("order", ["end first", "key first"])
def test_a_key_that_is_told_anew(pair: Pair, order: str) -> None:
    """The owner ends it, memory in it is registered again, and both messages are on their way."""
    pair.shown = [pair.key(0)]
    pair.move()
    if order == "end first":
        pair.end(0)
        pair.shown = [pair.key(1)]
        pair.move()
    else:
        pair.reader._open_one(pair.key(1))
        pair.end(0)
    assert (pair.closed(0), pair.closed(1)) == (True, False)
    assert pair.imports.open_keys[b"key"] == 1
    pair.move()
    pair.end(1)
    assert pair.closed(1)
    assert pair.imports.open_keys[b"key"] == 0


def test_a_key_that_is_told_anew_during_a_movement(pair: Pair) -> None:
    """Its old counter changes only when the movement is done, also if the end is told again."""
    seen = []

    def during() -> None:
        pair.during = lambda: None
        pair.reader._open_one(pair.key(1))
        pair.end(0)
        seen.append((pair.closed(0), pair.closed(1)))
        pair.end(1)
        seen.append((pair.closed(0), pair.closed(1)))

    pair.shown, pair.during = [pair.key(0)], during
    pair.move()
    assert seen == [(False, False), (False, True)]
    assert pair.closed(0)
    assert pair.imports.open_keys[b"key"] == 0


def test_the_end_of_the_link_closes_everything(pair: Pair) -> None:
    pair.shown = [pair.key(0)]
    pair.move()
    pair.reader.close()
    assert (pair.imports.open_keys[b"key"], pair.closed(0)) == (0, True)
    pair.shown = [pair.key(1)]
    with pytest.raises(PathUnavailable):
        pair.move()
    assert (pair.imports.open_keys[b"key"], pair.closed(1)) == (0, True)
