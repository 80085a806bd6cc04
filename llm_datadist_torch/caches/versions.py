# SPDX-License-Identifier: Apache-2.0
"""Counters in shareable memory, by which peers notice without asking that a cache has changed.

Each cache has two. A peer that kept what it knows of a cache compares *binding* before it reads:
it changes with the keys of the cache and with its end. It compares *memory* after it has read: it
changes when the cache's memory may become another cache's.
"""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass

import torch

from llm_datadist_torch import _C
from llm_datadist_torch.memory.allocate import allocate_tensors
from llm_datadist_torch.memory.region import Region

WORD_BYTES = 8
SLOTS = 4096
"""Caches per region of counters: 64 KiB."""


@dataclass(frozen=True, eq=False)
class Generation:
    """The two counters of one cache. They only ever grow, also from one cache to the next."""

    region: Region
    offset: int
    pid: int

    @property
    def binding(self) -> int:
        """The counter at ``offset``."""
        return _C.load_word(self.region.address + self.offset)

    @property
    def memory(self) -> int:
        """The counter after it."""
        return _C.load_word(self.region.address + self.offset + WORD_BYTES)

    def rebound(self) -> None:
        """What peers know of the cache is out of date."""
        self._bump(self.offset)

    def freed(self) -> None:
        """The memory may be used for something else from now on."""
        self._bump(self.offset)
        self._bump(self.offset + WORD_BYTES)

    def _bump(self, offset: int) -> None:
        # A forked child shares the pages, but what it forgets is not the parent's.
        if os.getpid() == self.pid:
            _C.bump_word(self.region.address + offset)


class Generations:
    """Gives each cache of an instance its counters.

    Thread safety: all methods may be called from any thread.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._free: list[tuple[Region, int]] = []

    def take(self) -> Generation:
        """Counters for a new cache.

        Raises:
            LLMOutOfMemoryError: There is no memory for more of them.
        """
        with self._lock:
            if not self._free:
                _, region = allocate_tensors((SLOTS, 2), torch.int64, 1)
                step = 2 * WORD_BYTES
                offsets = range((SLOTS - 1) * step, -step, -step)
                self._free = [(region, offset) for offset in offsets]
            region, offset = self._free.pop()
        return Generation(region, offset, os.getpid())

    def give_back(self, generation: Generation) -> None:
        """The cache is gone and :meth:`Generation.freed` was called."""
        with self._lock:
            self._free.append((generation.region, generation.offset))
